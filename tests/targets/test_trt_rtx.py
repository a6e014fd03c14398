"""TensorRT-RTX parses and builds every family, precision and pruning level, and its engines do what the graph says.

No GPU is needed; the engines are not run here (tests/device/gpu does).
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from compressor import build_plan
from compressor.errors import TargetUnavailable
from compressor.lower import lower
from compressor.types import Artifact, BuildOptions, Width
from targets import _tensorrt, _venv, trt, trt_rtx
from tests.targets.networks import FAMILIES, LEVELS, PLAIN, grids, model, of, pruned

STATE = trt_rtx.available()
pytestmark = pytest.mark.skipif(not STATE.available, reason=f"{STATE.reason}; {STATE.fix}")
SETTINGS = {"package": trt_rtx.PACKAGE, "timing_cache": "", "portable": ""}
FLOATS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "w8a8": "fp16", "fp8": "fp16"}
WIDTHS: dict[str, Width] = {"w8a8": 8, "fp8": "e4m3"}


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_tensorrt.Call]:
    """One process of the vendor's environment for all builds of this file."""
    if not _venv.availability(trt_rtx.RECIPE).available:
        yield _tensorrt.here(trt_rtx.NAME, trt_rtx.FIX)
        return
    with _venv.Worker(trt_rtx.RECIPE, trt_rtx.WORKER, tmp_path_factory.mktemp("log") / "build.log") as worker:
        yield worker.call


def built(spec, precision: str, folder: Path, call: _tensorrt.Call, chip: str = "") -> Artifact:
    network = model(spec)
    graph = lower(network, trt_rtx.CAPABILITIES, grids(network, WIDTHS[precision]) if precision in WIDTHS else None)
    planned = trt_rtx.plan(graph, BuildOptions(folder, precision, chip=chip))
    return _tensorrt.build_engine(planned, folder, SETTINGS, call)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", trt_rtx.CAPABILITIES.precisions)
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_does_what_the_graph_says(family, precision, level, tmp_path, call):
    spec = LEVELS[level](FAMILIES[family])
    found = built(spec, precision, tmp_path, call).settings
    assert (found["foreign_types"], found["added_casts"]) == ("0", "0")
    products = dict(reversed(part.split()) for part in found["products"].split(", "))
    narrow = {"w8a8": "int8", "fp8": "fp8"}.get(precision)
    assert products.keys() == {FLOATS[precision]} | ({narrow} if narrow else set())
    if narrow:  # of each block q/k/v merged or not, proj, fc1, fc2; of int8 the patch embedding too
        assert int(products[narrow]) >= 4 * len(spec.blocks) + (narrow == "int8")
    # TensorRT-RTX has no fused kernel for float32 attention. The other precisions have one for every block.
    assert found["fused_attention"] == ("0" if precision == "fp32" else str(len(spec.blocks)))


def test_unequal_heads_lose_the_fused_attention(tmp_path, call):
    """Why the graph is padded: without it, pruning q and k alone costs the fused kernel."""
    plain = replace(trt_rtx.CAPABILITIES, equal_heads=False)
    planned = trt_rtx.plan(lower(model(pruned(PLAIN)), plain), BuildOptions(tmp_path, "fp16"))
    assert _tensorrt.build_engine(planned, tmp_path, SETTINGS, call).settings["fused_attention"] == "0"


def test_kernels_carry_the_names_of_the_graph(tmp_path, call):
    made = built(of(), "fp16", tmp_path, call)
    names = {part for record in _tensorrt.records(made, {}) for part in record.name.split(" + ")}
    ours = {f"blocks.{i}.{part}.matmul" for i in range(2) for part in ("q", "k", "v", "proj", "fc1", "fc2")}
    assert ours <= names
    assert all(record.time_ms == 0.0 for record in _tensorrt.records(made, {}))  # nothing ran


def test_public_build_names_the_chip_and_seals_both_files(tmp_path):
    graph = lower(model(PLAIN), trt_rtx.CAPABILITIES)
    made = trt_rtx.build(graph, BuildOptions(tmp_path, "fp16", "engine", chip="SM89"))
    assert (made.settings["stage"], made.settings["chip"]) == ("engine", "SM89")
    assert [file.name for file in made.files] == ["engine.engine", "engine.layers.json"]
    assert made.size_bytes == sum(file.stat().st_size for file in made.files)


def test_chip_without_bf16_is_refused_with_the_vendors_words(tmp_path, call):
    with pytest.raises(TargetUnavailable, match="sm75"):
        built(PLAIN, "bf16", tmp_path, call, chip="SM75")
    assert built(PLAIN, "fp16", tmp_path, call, chip="SM75").size_bytes > 0


@pytest.mark.parametrize("target", [trt, trt_rtx], ids=["tensorrt", "tensorrt-rtx"])
def test_plans_are_checked_without_a_gpu(target, tmp_path):
    graph = lower(model(PLAIN), target.CAPABILITIES)
    planned = target.plan(graph, BuildOptions(tmp_path, "bf16", "bf16"))
    found = target.check(planned)
    assert (found["chip"], found["builder"]) == ("SM89", f"tensorrt-rtx {STATE.version}")
    assert (found["products"].split()[1], found["fused_attention"], found["foreign_types"]) == ("bf16", "2", "0")
    assert [file.name for file in tmp_path.iterdir()] == ["bf16.onnx"]
    both = replace(planned, files=(planned.path, target.plan(graph, BuildOptions(tmp_path, "fp16", "fp16")).path))
    checked = build_plan.check_plan(both, "SM75")
    assert checked["engines"]["fp16"]["chip"] == "SM75"
    assert list(checked["refused"]) == ["bf16"] and "sm75" in checked["refused"]["bf16"]


def test_fp8_is_checked_for_chips_that_have_it(tmp_path):
    network = model(PLAIN)
    planned = trt.plan(lower(network, trt.CAPABILITIES, grids(network, "e4m3")), BuildOptions(tmp_path, "fp8", "fp8"))
    assert "fp8" in build_plan.check_plan(planned, "SM120")["engines"]["fp8"]["products"]
    refused = build_plan.check_plan(planned, "SM86")
    assert refused == {"engines": {}, "refused": {"fp8": refused["refused"]["fp8"]}}
    assert "SM89 or later for fp8, got 'SM86'" in refused["refused"]["fp8"]


def test_unknown_chip_is_refused(tmp_path, call):
    with pytest.raises(TargetUnavailable, match="SM89"):
        built(PLAIN, "fp16", tmp_path, call, chip="SM90")


def test_graph_the_parser_rejects_is_refused(tmp_path, call):
    foreign = lower(model(PLAIN), trt_rtx.CAPABILITIES)
    next(node for node in foreign.graph if node.op_type == "Softmax").op_type = "Entmax"
    with pytest.raises(TargetUnavailable, match="Entmax"):
        _tensorrt.build_engine(trt_rtx.plan(foreign, BuildOptions(tmp_path, "fp32")), tmp_path, SETTINGS, call)


@pytest.mark.skipif(find_spec(trt_rtx.PACKAGE) is not None, reason="TensorRT-RTX is installed in this Python")
def test_engine_is_not_run_in_another_process(tmp_path, call):
    with pytest.raises(TargetUnavailable, match="load") as caught:
        trt_rtx.open(built(PLAIN, "fp16", tmp_path, call))
    assert "machine with the GPU" in caught.value.hint
