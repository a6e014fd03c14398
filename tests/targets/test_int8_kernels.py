"""int8 is what the runtime executes, not what the file says: proven from each runtime's own execution graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import targets
from compressor.kernels import int8_share
from compressor.lower import lower
from compressor.roofline import work
from compressor.types import Artifact, BuildOptions, Model, OpRecord, Precision, QParams, Quantization, TensorSpec
from targets import ov
from targets._artifacts import digest
from tests.models import BASE, SPECS, linear_sites, minmax, random_model, random_pixels, torch_logits, with_scores

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "MatMulIntegerToFloat", "FullyConnected", "Convolution", "Conv")


def build(name: str, model: Model, folder: Path, precision: Precision, plan: Quantization | None) -> Artifact:
    target = targets.get(name)
    return target.build(lower(model, target.CAPABILITIES, plan), BuildOptions(folder, precision))


def linears(model: Model) -> set[str]:
    return {name.removesuffix(".weight") for name in linear_sites(model.spec)}


def executed(records: tuple[OpRecord, ...], model: Model) -> dict[str, str]:
    """Linear layer -> precision of the matrix product the runtime executed for it."""
    found = {}
    for record in records:
        layer = record.name.split(".matmul")[0].removesuffix(".add").replace("logits", "head")
        if record.type in PRODUCTS and layer in linears(model):
            found[layer] = record.precision
    return found


@pytest.mark.parametrize("name", ["ort", "openvino"])
@pytest.mark.parametrize("spec", ["unequal widths", "swiglu", "distilled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_linear_runs_in_int8(name, spec, batch, tmp_path):
    model = random_model(SPECS[spec])
    pixels = random_pixels(model.spec, batch)
    artifact = build(name, model, tmp_path, "w8a8", minmax(model, pixels))
    ran = executed(targets.get(name).open(artifact).ops({"pixels": pixels}), model)
    assert ran == dict.fromkeys(linears(model), "int8")


@pytest.mark.parametrize("spec", ["unequal widths", "one block", "distilled"])
def test_scores_run_in_int8_where_the_plan_has_grids_for_q_and_k(spec, tmp_path):
    model = random_model(SPECS[spec])
    pixels = random_pixels(model.spec, 1)
    plain = minmax(model, pixels)
    want, macs = torch_logits(model, pixels), work(model.spec)
    scores = {i: macs[i, "attention"][0] * b.qk_dim / (b.qk_dim + b.v_dim) for i, b in enumerate(model.spec.blocks)}
    found = {}
    for label, plan in (("plain", plain), ("scores", with_scores(plain, model, pixels))):
        session = ov.open(build("openvino", model, tmp_path / label, "w8a8", plan))
        found[label] = int8_share(session.ops({"pixels": pixels}), model.spec)["int8_mac_share"]
        assert np.abs(session.run({"pixels": pixels})["logits"] - want).max() < 0.35
    total = sum(sizes[0] for sizes in macs.values())
    assert found["scores"] - found["plain"] == pytest.approx(sum(scores.values()) / total)  # plain is the control
    assert found["scores"] < 1  # the product with v stays in float


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_zero_points_of_activations_stay_in_int8(name, tmp_path):
    model, pixels = random_model(), random_pixels(BASE, 1)
    plan = minmax(model, pixels)
    moved = {s: QParams(q.scale, 7, 8) for s, q in plan.activations.items()}
    artifact = build(name, model, tmp_path, "w8a8", Quantization(plan.weights, moved))
    session = targets.get(name).open(artifact)
    assert executed(session.ops({"pixels": pixels}), model) == dict.fromkeys(linears(model), "int8")
    assert np.abs(session.run({"pixels": pixels})["logits"] - torch_logits(model, pixels)).max() < 0.35


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_a_float_artifact_runs_none_in_int8(name, tmp_path):
    """The control: the same reading of the same table."""
    model, pixels = random_model(), random_pixels(BASE, 1)
    records = targets.get(name).open(build(name, model, tmp_path, "fp32", None)).ops({"pixels": pixels})
    ran = executed(records, model)
    assert ran == dict.fromkeys(linears(model), "fp32")
    assert not [record for record in records if record.precision == "int8"]


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_a_partial_plan_is_seen(name, tmp_path):
    model, pixels = random_model(), random_pixels(BASE, 1)
    plan = minmax(model, pixels)
    some = Quantization({n: q for n, q in plan.weights.items() if "fc" in n}, plan.activations)
    ran = executed(targets.get(name).open(build(name, model, tmp_path, "w8a8", some)).ops({"pixels": pixels}), model)
    assert {layer for layer, precision in ran.items() if precision == "int8"} == {
        n for n in linears(model) if "fc" in n
    }


def test_ort_optimizes_no_weight_back_to_float(tmp_path):
    """ONNX Runtime's optimized model holds every weight as int8 and multiplies none of them as float."""
    model = random_model()
    artifact = build("ort", model, tmp_path, "w8a8", minmax(model, random_pixels(BASE)))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(artifact.path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    weights = {i.name: i.data_type for i in graph.initializer if i.name.endswith(".weight") and len(i.dims) > 1}
    assert set(weights) == {f"{layer}.weight" for layer in linears(model)}
    assert set(weights.values()) == {onnx.TensorProto.INT8}
    readers = {name: [n.op_type for n in graph.node if name in n.input] for name in weights}
    assert all(types == ["MatMulIntegerToFloat"] for types in readers.values())


def test_unpacking_integers_is_no_work_in_integers(tmp_path):
    """Moving them is; of a node that makes floats of them the gate's share of int8 time must not be made."""
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["pixels", "scale", "zero"], ["packed"], name="pack"),
        onnx.helper.make_node("Transpose", ["packed"], ["moved"], name="move", perm=[1, 0]),
        onnx.helper.make_node("DequantizeLinear", ["moved", "scale", "zero"], ["logits"], name="unpack"),
    ]
    pixels, logits = (
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, 4]) for n in ("pixels", "logits")
    )
    grid = [onnx.numpy_helper.from_array(a, n) for n, a in (("scale", np.float32(0.1)), ("zero", np.int8(0)))]
    graph = onnx.helper.make_graph(nodes, "g", [pixels], [logits], grid)
    opset = [onnx.helper.make_opsetid("", 20)]
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())
    ends = tuple((TensorSpec(name, "float32", (4, 4)),) for name in ("pixels", "logits"))
    artifact = Artifact("ort", path, digest((path,)), path.stat().st_size, "w8a8", *ends)
    records = targets.get("ort").open(artifact).ops({"pixels": np.ones((4, 4), np.float32)})
    assert {r.name: r.precision for r in records} == {"pack": "fp32", "move": "int8", "unpack": "fp32"}


def test_bf16_is_executed_where_the_processor_has_it(tmp_path):
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bf16 instructions")
    model, pixels = random_model(), random_pixels(BASE, 1)
    records = targets.get("openvino").open(build("openvino", model, tmp_path, "bf16", None)).ops({"pixels": pixels})
    assert set(executed(records, model).values()) == {"bf16"}


def test_variants_change_only_what_is_not_int8(tmp_path):
    model, pixels = random_model(), random_pixels(BASE, 1)
    artifact = build("openvino", model, tmp_path, "w8a8", minmax(model, pixels))
    variants = ov.variants(artifact)
    assert variants[0] == artifact and len({v.sha256 for v in variants}) == 1
    want = torch_logits(model, pixels)
    for variant in variants:
        session = ov.open(variant)
        assert set(executed(session.ops({"pixels": pixels}), model).values()) == {"int8"}
        assert np.abs(session.run({"pixels": pixels})["logits"] - want).max() < 0.35
    fp32 = build("openvino", model, tmp_path, "fp32", None)
    assert ov.variants(fp32) == (fp32,)


@pytest.mark.filterwarnings("ignore")  # NNCF's own
def test_nncf_is_another_quantizer_under_the_same_interface(tmp_path):
    pytest.importorskip("nncf")
    model, pixels = random_model(), random_pixels(BASE, 4)
    graph = lower(model, ov.CAPABILITIES)
    artifact = ov.build(graph, BuildOptions(tmp_path, "w8a8", "nncf", quantizer="nncf", calibration=(pixels,)))
    session = ov.open(artifact)
    assert np.abs(session.run({"pixels": pixels})["logits"] - torch_logits(model, pixels)).max() < 0.35
    precisions = [r.precision for r in session.ops({"pixels": pixels[:1]}) if r.type == "FullyConnected"]
    assert precisions.count("int8") >= 12
