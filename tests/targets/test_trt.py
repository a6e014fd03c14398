"""The strongly typed graph and the build plan, which need neither TensorRT nor a GPU."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest

import targets
from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.lower import lower
from compressor.types import BuildOptions, QParams, Quantization
from targets import _tensorrt, trt
from tests.targets.networks import FAMILIES, PLAIN, grids, model, of, pixels, pruned

EVERY_FAMILY = pytest.mark.parametrize("spec", list(FAMILIES.values()), ids=list(FAMILIES))


def run(graph: onnx_ir.Model, images: np.ndarray) -> np.ndarray:
    """Logits of ONNX Runtime, an independent reader of the graph."""
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph).SerializeToString())
    return session.run(None, {"pixels": images})[0]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def floats(graph: onnx_ir.Model) -> set[str]:
    return {v.dtype.name for v in graph.graph.initializers.values() if "FLOAT" in v.dtype.name}


@EVERY_FAMILY
def test_fp16_graph_computes_the_model(spec):
    graph = lower(model(spec), trt.CAPABILITIES)
    expected = run(graph, pixels(spec))
    half = _tensorrt.typed(graph, "fp16")
    assert floats(half) == {"FLOAT16"}
    got = run(half, pixels(spec))
    assert got.dtype == np.float32
    assert 0 < distance(got, expected) < 1e-2  # 11 bits of mantissa, some twenty layers; not 0: it did change precision


def test_another_models_fp16_graph_is_told_apart():
    expected = run(lower(model(PLAIN), trt.CAPABILITIES), pixels(PLAIN))
    other = _tensorrt.typed(lower(model(PLAIN, seed=1), trt.CAPABILITIES), "fp16")
    assert distance(run(other, pixels(PLAIN)), expected) > 0.1


def test_int8_graph_is_fp16_around_the_integers():
    network = model(PLAIN)
    graph = lower(network, trt.CAPABILITIES, grids(network))
    half = _tensorrt.typed(graph, "w8a8")
    assert floats(half) == {"FLOAT16"}
    integers = {v.name for v in half.graph.initializers.values() if v.dtype.name == "INT8"}
    assert {"blocks.0.q.weight", "blocks.1.fc2.weight", "head.weight", "patch.weight"} <= integers
    exact, integer = (run(g, pixels(PLAIN)) for g in (lower(network, trt.CAPABILITIES), graph))
    # fp16 around the integers moves single activations to the neighbouring step: no worse an approximation of the model
    assert distance(run(half, pixels(PLAIN)), exact) < 1.5 * distance(integer, exact) < 0.2


def test_bf16_and_fp32_graphs_hold_one_float_type():
    graph = lower(model(PLAIN), trt.CAPABILITIES)
    assert floats(_tensorrt.typed(graph, "bf16")) == {"BFLOAT16"}
    assert floats(_tensorrt.typed(graph, "fp32")) == {"FLOAT"}
    assert floats(graph) == {"FLOAT"}  # the argument is left alone
    casts = [n.name for n in _tensorrt.typed(graph, "bf16").graph if n.op_type == "Cast"]
    assert casts == ["pixels.cast", "logits.cast"]


def test_weight_beyond_fp16_is_refused_and_bf16_is_proposed():
    network = model(PLAIN)
    large = dict(network.weights)
    large["blocks.0.fc1.weight"] = np.full_like(large["blocks.0.fc1.weight"], 1e5)
    graph = lower(replace(network, weights=large), trt.CAPABILITIES)
    with pytest.raises(ConfigError, match=r"blocks\.0\.fc1\.weight") as caught:
        _tensorrt.typed(graph, "fp16")
    assert "bf16" in caught.value.hint
    _tensorrt.typed(graph, "bf16")


@pytest.mark.parametrize("widths", [(8, 16), (16, 8), (7, 5)], ids=["narrow_qk", "narrow_v", "odd"])
def test_padded_heads_compute_the_same(widths):
    spec = of(qk_dim=widths[0], v_dim=widths[1])
    plain = replace(trt.CAPABILITIES, equal_heads=False)
    padded = lower(model(spec), trt.CAPABILITIES)
    expected = run(lower(model(spec), plain), pixels(spec))
    assert distance(run(padded, pixels(spec)), expected) < 1e-5  # zeros add nothing; float32 sums in another order
    assert sum(node.name.endswith(".pad") for node in padded.graph) > sum(
        node.name.endswith(".pad") for node in lower(model(spec), plain).graph
    )


def test_heads_of_one_width_are_not_padded():
    names = [node.name for node in lower(model(PLAIN), trt.CAPABILITIES).graph]
    assert [name for name in names if name.endswith(".pad")] == ["tokens.pad"]


# --------------------------------------------------------------------------- plan


def plan(folder: Path, precision: str = "fp16", seed: int = 0):
    graph = lower(model(pruned(PLAIN), seed), trt.CAPABILITIES)
    return trt.plan(graph, BuildOptions(folder, precision, chip="ampere+"))


def test_plan_replays_to_the_same_bytes(tmp_path):
    first, second, other = plan(tmp_path / "a"), plan(tmp_path / "b"), plan(tmp_path / "c", seed=1)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256 != other.sha256
    assert first.settings == {"stage": "plan", "chip": "ampere+"}
    assert (first.inputs[0].dtype, first.outputs[0].dtype) == ("float32", "float32")


def test_plan_is_not_run(tmp_path):
    with pytest.raises(TargetUnavailable, match="build plan") as caught:
        trt.open(plan(tmp_path))
    assert "vitrim build" in caught.value.hint


def test_unknown_chip_is_refused(tmp_path):
    graph = lower(model(PLAIN), trt.CAPABILITIES)
    with pytest.raises(ConfigError, match=re.escape("must be one of ampere+, version+, got 'SM89'")):
        trt.plan(graph, BuildOptions(tmp_path, "fp16", chip="SM89"))


def test_changed_plan_is_not_built(tmp_path):
    made = plan(tmp_path)
    made.path.write_bytes(made.path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="sha256"):
        trt.build_engine(made, tmp_path)


def test_asymmetric_grid_is_refused(tmp_path):
    network = model(PLAIN)
    fine, site = grids(network), "blocks.1.fc1"
    skewed = Quantization(fine.weights, {**fine.activations, site: QParams(np.float32(0.04), 3, 8)})
    options = BuildOptions(tmp_path, "w8a8")
    assert trt.plan(lower(network, trt.CAPABILITIES, fine), options).size_bytes > 0
    with pytest.raises(ConfigError, match=site):
        trt.plan(lower(network, trt.CAPABILITIES, skewed), options)


def test_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="w4a8"):
        plan(tmp_path, "w4a8")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_without_tensorrt_the_fix_is_named(tmp_path):
    state = targets.get("tensorrt").available()
    assert not state.available
    assert "JetPack" in state.fix
    with pytest.raises(TargetUnavailable, match="tensorrt") as caught:
        trt.build_engine(plan(tmp_path), tmp_path)
    assert caught.value.hint == state.fix


# --------------------------------------------------------------------------- what became of the graph

TABLE = (
    "Name: __myl_Cast_myl0_0, LayerType: kgen, Inputs: [ { Name: pixels, Dimensions: [1,3], Datatype: Float, Format: x }], "
    "Constants: [], Outputs: [ { Name: a, Dimensions: [1], Datatype: Half, Format: x }], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: pixels.cast]",
    "Name: blocks.0.fc1.matmul_U1_myl0_1, LayerType: gemm, Inputs: [ { Name: a, Datatype: Int8, Format: x }], Constants: "
    "[ { Name: w, Datatype: Half, Format: x }], Outputs: [ { Name: b, Datatype: Half, Format: x }], TacticName: Datatype: x, "
    "Metadata: [ONNX Layer: blocks.0.fc1.matmul][ONNX Layer: blocks.0.fc1.add]",
    "Name: _gemm_mha_v2_myl0_2, LayerType: kgen, Inputs: [ { Name: b, Datatype: Half, Format: x }], Constants: [], "
    "Outputs: [ { Name: c, Datatype: Int8, Format: x }], TacticName: t, Metadata: [ONNX Layer: blocks.0.softmax]",
)


def test_layer_table_is_read():
    cast, product, attention = _tensorrt.engine_layers(TABLE)
    assert cast.only_converts
    assert not product.only_converts
    assert (product.multiplies, product.precision, product.writes) == (True, "int8", ("fp16",))
    assert product.nodes == ("blocks.0.fc1.matmul", "blocks.0.fc1.add")
    assert (attention.fused_attention, attention.reads, attention.writes) == (True, ("fp16",), ("int8",))


@pytest.mark.parametrize("content", [None, "", "[]", '{"layers": 3}'])
def test_an_engine_without_its_layers_is_refused(content, tmp_path):
    made, listing = plan(tmp_path), tmp_path / "fp32.layers.json"
    listing.write_text(json.dumps({"layers": TABLE}))
    whole = replace(made, files=(made.path, listing))
    assert len(_tensorrt.records(whole, {})) == 3  # the control
    if content is None:
        whole = made
    else:
        listing.write_text(content)
    with pytest.raises(BundleError, match="must have its list of layers beside it"):
        _tensorrt.records(whole, {})


def test_findings_count_what_was_not_asked_for():
    network = [
        ["pixels.cast", "CAST", "HALF"],
        ["blocks.0.fc1.matmul", "MATRIX_MULTIPLY", "HALF"],
        ["blocks.0.norm1", "NORMALIZATION", "FLOAT"],
        ["(Unnamed Layer) [Cast]", "CAST", "FLOAT"],
        ["shape", "ELEMENTWISE", "INT64"],
    ]
    found = _tensorrt.findings({"layers": TABLE, "network": network}, "w8a8")
    assert found == {
        "products": "1 fp16, 1 int8",
        "fused_attention": "1",
        "typed_layers": "2",
        "foreign_types": "1",
        "added_casts": "1",
        "conversions": "1",
        "kernels": "3",
    }
    assert _tensorrt.findings({"layers": (), "network": network[:2]}, "w8a8")["foreign_types"] == "0"
