"""Rockchip through rknn-toolkit2 and its simulator, on two blocks."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import calibration
from compressor import checkpoint
from compressor.errors import BundleError, ConfigError, ParityError, TargetUnavailable
from compressor.inference import Source, evaluate_source
from compressor.lower import lower
from compressor.manifest import artifact_entry, seal
from compressor.types import BuildOptions
from targets import _choice, _estimate, rknn
from targets._venv import Limits
from tests.npu.models import cosine, first_blocks, images, torch_logits, uneven

STATE = rknn.available()
needs_toolkit = pytest.mark.skipif(not STATE.available, reason=f"{STATE.reason}; {STATE.fix}")

# The fifth row of the second table has the column that rk3576 adds for convolutions.
LOG = """I rknn-toolkit2 version: 2.5.0
D RKNN: [01:00:00.1] ID   OpType         DataType Target InputShape     OutputShape   Cycles(DDR/NPU/Total)    RW(KB)  FullName
D RKNN: [01:00:00.1] 0    Conv           INT8     NPU    (1,1),(2)      (1,1)         9/9/9                    9       Conv:an.older.table
I rknn-toolkit2 version: 2.5.0
D RKNN: [01:07:31.714] ID   OpType         DataType Target InputShape     OutputShape   Cycles(DDR/NPU/Total)    RW(KB)  FullName
D RKNN: [01:07:31.714] ------------------------------------------------------------------------------------------------
D RKNN: [01:07:31.714] 0    InputOperator  INT8     CPU    \\              (1,1,28,28)   0/0/0                    0       InputOperator:pixels
D RKNN: [01:07:31.714] 1    Conv           INT8     NPU    (1,1,28,28),   (1,1,28,28)   12/100/100               147
D RKNN: [01:07:31.714] 2    Conv           INT8     NPU    (1,1,28,28),   (1,192,7,7)   70/60/70                 8       Conv:patch.conv
D RKNN: [01:07:31.714] 3    Reshape        INT8     CPU    (1,3),(4)      (3,1)         0/0/0                    7       Reshape:patch.flat_rs
D RKNN: [01:07:31.714] 4    ConvAdd        INT8     NPU    (1,1),(2),...  (1,1)         4/5/5           0%       1       Conv:blocks.0.proj.matmul#2_ConvAdd
D RKNN: [01:07:31.714] 5    exSDPAttention INT8     NPU    (3,64,1,50),.. (3,64,1,1)    0/0/0                    3       exSDPAttention:blocks.0.values_2sdpa
D RKNN: [01:07:31.714] 6    OutputOperator INT8     CPU    (1,10)         \\             0/0/0                    0       OutputOperator:logits
D RKNN: [01:07:31.714] ------------------------------------------------------------------------------------------------
"""  # noqa: E501 a line of the table


def graph_of(count, **changed):
    return lower(first_blocks(count), replace(rknn.CAPABILITIES, **changed))


def test_the_last_table_of_the_log_is_read():
    found = rknn._parse(LOG, graph_of(1), "rk3588")
    assert [(op.name, op.type, op.placement, op.precision) for op in found.ops] == [
        ("Conv1", "Conv", "NPU", "int8"),
        ("patch.conv", "Conv", "NPU", "int8"),
        ("patch.flat_rs", "Reshape", "CPU", "int8"),
        ("blocks.0.proj.matmul#2_ConvAdd", "ConvAdd", "NPU", "int8"),
        ("blocks.0.values_2sdpa", "exSDPAttention", "NPU", "int8"),
    ]
    assert found.to_json()["cpu_ops"] == [{"name": "patch.flat_rs", "type": "Reshape"}]
    assert [(p["cycles"], p["ddr_bytes"]) for p in found.subgraphs] == [(170, 155 << 10), (5, 4 << 10)]
    assert found.subgraphs[0]["cycles_by_op"] == {"Conv1": 100, "patch.conv": 70}
    assert found.latency_ms is None and "cycles of exSDPAttention" in found.leaves_out
    assert found.estimator == "rknn-toolkit2 2.5.0 cycle table, rk3588"


def test_multiplies_on_the_cpu_are_found_under_the_compilers_names():
    graph = graph_of(1)
    macs = _estimate.macs_by_node(graph)
    assert rknn._parse(LOG, graph, "rk3588").npu_mac_share == 1.0  # its only row on the CPU multiplies nothing
    for kind, lost in {
        "exSDPAttention INT8     ": ("scores", "values"),  # fused attention stands for two products
        "ConvAdd        INT8     ": ("proj.matmul",),
    }.items():
        found = rknn._parse(LOG.replace(f"{kind}NPU", f"{kind}CPU"), graph, "rk3588")
        gone = sum(macs[f"blocks.0.{name}"] for name in lost)
        assert found.npu_mac_share == pytest.approx(1 - gone / sum(macs.values())) and gone > 0


@pytest.mark.parametrize("log", ["", LOG.replace("] 4 ", "] 4: ")])
def test_a_log_without_a_whole_table_is_an_error(log):
    with pytest.raises(TargetUnavailable, match="got no whole table"):
        rknn._parse(log, graph_of(1), "rk3588")


def test_wrong_options_are_refused_before_anything_starts(tmp_path):
    graph = graph_of(1)
    with pytest.raises(ConfigError, match="at least one batch for target 'rknn'"):
        rknn.build(graph, BuildOptions(tmp_path, "w8a8"))
    with pytest.raises(ConfigError, match=r"must be one of rk3588, .*, got 'rk1'"):
        rknn.build(graph, BuildOptions(tmp_path, "w8a8", chip="rk1"))
    with pytest.raises(ConfigError, match="must be one of w8a8, got 'fp32'"):
        rknn.build(graph, BuildOptions(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    model = first_blocks(2)
    options = BuildOptions(tmp_path_factory.mktemp("rknn"), "w8a8", calibration=(images(model, 20),))
    return model, rknn.build(lower(model, rknn.CAPABILITIES), options)


@needs_toolkit
def test_the_whole_network_is_on_the_npu(built):
    found = _estimate.read(built[1])
    assert found.cpu_ops == () and len(found.subgraphs) == 1 and found.npu_mac_share == 1.0
    assert found.subgraphs[0]["cycles"] > 10_000
    assert {"exNorm", "exSDPAttention", "ConvExGelu"} <= {op.type for op in found.ops}  # fused as the chip has them


@needs_toolkit
def test_the_simulated_chip_computes_the_model(built):
    model, artifact = built
    x = images(model, 24)[20:]  # not calibrated on
    session = rknn.open(artifact)
    got, want = session.run({"pixels": x})["logits"], torch_logits(model, x)
    assert got.shape == (4, 10) and cosine(got, want) > 0.99
    assert cosine(got[::-1], want) < 0.99  # control: other images' logits are further away
    assert session.ops({}) == session.estimate().ops


@needs_toolkit
def test_a_bundle_is_evaluated_against_its_float_model(built, tmp_path):
    model, artifact = built
    bundle, home = tmp_path / "b", tmp_path / "b/targets/rknn"
    checkpoint.save(model, bundle)
    shutil.copytree(artifact.path.parent, home)
    moved = replace(artifact, path=home / artifact.path.name, files=tuple(home / f.name for f in artifact.files))
    np.savez(bundle / "golden.npz", inputs=images(model, 1), reference=np.zeros((1, 10), np.float32))
    content = {key: {} for key in ("recipe", "versions", "calibration", "checkpoint")}
    content |= {"spec": asdict(model.spec), "preprocess": asdict(model.preprocess), "labels": [], "seed": 0}
    seal(bundle, {**content, "targets": {"rknn": artifact_entry(moved, bundle).model_dump()}})
    with np.load(Path(calibration.__file__).parents[1] / "compressor/demo/evaluation.npz") as data:
        np.savez(tmp_path / "few.npz", images=data["images"][:20], labels=data["labels"][:20])
    found = evaluate_source(Source(str(bundle), "rknn"), str(tmp_path / "few.npz"), None, lambda *_: None)
    assert (found["target"], found["n"]) == ("rknn", 20) and found["agreement"] >= 80 and found["mean_cosine"] > 0.99


@needs_toolkit
def test_additions_are_in_16_bits_where_the_residual_stream_needs_them(built, tmp_path):
    """A few channels far above the others; control: `built`, whose own are even and stay int8."""

    def precisions(artifact):
        return {op.precision for op in _estimate.read(artifact).ops}

    model, even = built
    assert even.settings["int16"] == "nothing" and "int16: divergence" in even.settings["measured"]
    assert precisions(even) == {"int8"}
    model = uneven(model)
    artifact = rknn.build(
        lower(model, rknn.CAPABILITIES), BuildOptions(tmp_path, "w8a8", calibration=(images(model, 20),))
    )
    assert artifact.settings["int16"] == "additions" and precisions(artifact) == {"int8", "int16"}
    assert _estimate.read(artifact).cpu_ops == ()
    x = images(model, 24)[20:]
    assert cosine(rknn.open(artifact).run({"pixels": x})["logits"], torch_logits(model, x)) > 0.99


@needs_toolkit
def test_a_quantized_model_that_is_another_network_is_refused(built, tmp_path, monkeypatch):
    """Its logits are those of other images; control: `built`."""
    model, _ = built
    real = _choice.float_logits
    monkeypatch.setattr(_choice, "float_logits", lambda graph, x: real(graph, x)[::-1])
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 20),))
    with pytest.raises(ParityError, match=r"at least 90% of the classes must be float's, got \d+ of 20 \(int8: "):
        rknn.build(lower(model, rknn.CAPABILITIES), options)
    assert not list(tmp_path.glob("*.rknn"))


@needs_toolkit
def test_a_damaged_artifact_is_refused(built):
    with pytest.raises(BundleError, match="must have sha256"):
        rknn.open(replace(built[1], sha256="0" * 64))


@needs_toolkit
def test_what_falls_back_is_reported(tmp_path):
    """Logits of rank 2 are a reshape on the CPU: the reason for CAPABILITIES.logits."""
    model = first_blocks(1)
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 2),))
    found = _estimate.read(rknn.build(graph_of(1, logits="matrix"), options))
    assert [op.type for op in found.cpu_ops] == ["Reshape"] and len(found.subgraphs) == 1


@needs_toolkit
def test_a_crash_and_a_timeout_of_the_toolkit_are_sentences(tmp_path, monkeypatch):
    model = first_blocks(1)
    options = BuildOptions(tmp_path, "w8a8", calibration=(np.zeros((1, 3, 8, 8), np.float32),))
    with pytest.raises(TargetUnavailable, match="'quantize' must succeed, got ValueError") as caught:
        rknn.build(lower(model, rknn.CAPABILITIES), options)
    assert "\n" not in str(caught.value) and "model.build.log" in caught.value.hint
    monkeypatch.setattr(rknn, "LIMITS", Limits(seconds=1))
    with pytest.raises(TargetUnavailable, match="no answer within 1 s"):
        rknn.build(lower(model, rknn.CAPABILITIES), options)
