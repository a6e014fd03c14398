"""The token layout: every graph against the torch module, and against what torch.onnx.export makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ConfigError
from compressor.lower import lower
from compressor.lower.qdq import weight_integers
from compressor.types import BlockSpec, Capabilities, Model, QParams, Quantization, VitSpec
from compressor.vit import to_torch
from tests.models import BASE, SPECS, minmax, random_model, random_pixels, torch_logits, with_scores

FLOAT = 1e-4  # float32, on logits of order 1
PLAIN = Capabilities("tokens", 20, ("fp32", "w8a8"))
ORT = replace(PLAIN, attention="fused", patch="unshuffle", qdq="integer_ops")
FORMS = {
    "plain": PLAIN,
    "ort": ORT,
    "packed": replace(PLAIN, qkv="packed"),
    "unshuffle": replace(PLAIN, patch="unshuffle"),
}


def session(graph: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=not any(o.domain for o in proto.opset_import))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(graph: ir.Model, pixels: np.ndarray) -> np.ndarray:
    return session(graph).run(None, {"pixels": pixels})[0]


def types(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


@pytest.mark.parametrize(("name", "form"), list(product(SPECS, ("plain", "ort"))))
def test_graph_computes_the_model(name, form):
    model = random_model(SPECS[name])
    graph = session(lower(model, FORMS[form]))
    for batch in (1, 3):
        pixels = random_pixels(model.spec, batch)
        error = np.abs(graph.run(None, {"pixels": pixels})[0] - torch_logits(model, pixels)).max()
        assert error < FLOAT


block_specs = st.builds(
    BlockSpec,
    heads=st.integers(1, 3),
    qk_dim=st.integers(2, 7),
    v_dim=st.integers(1, 7),
    mlp_dim=st.integers(1, 20),
    mlp=st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "swiglu"]),
    qk_norm=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(
    layers=st.lists(block_specs, min_size=1, max_size=3),
    pool=st.sampled_from(["token", "avg", "token_dist", "token_avg"]),
    size=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    prefix=st.integers(0, 4),
    classes=st.integers(0, 5),
    form=st.sampled_from(sorted(FORMS)),
)
def test_any_shape_computes_the_model(layers, pool, size, prefix, classes, form):
    prefix = max(prefix, {"token": 1, "avg": 0, "token_dist": 2, "token_avg": 1}[pool])
    spec = VitSpec(size, (4, 3), 3, 12, tuple(layers), prefix, pool, classes)
    model, pixels = random_model(spec), random_pixels(spec, 2)
    assert np.abs(run(lower(model, FORMS[form]), pixels) - torch_logits(model, pixels)).max() < FLOAT


@pytest.mark.parametrize(("stride", "halvings"), [(2, 2), (4, 1), (8, 0)])
def test_halved_patches_compute_the_model(stride, halvings):
    model = random_model(VitSpec((19, 16), (8, 8), 3, 12, (BlockSpec(1, 8, 8, 16),), num_classes=5))
    graph = lower(model, replace(PLAIN, patch="halving", patch_stride=stride, opset=18))
    assert sum(node.name.startswith("patch.halve") for node in graph.graph) == halvings
    last = next(node for node in graph.graph if node.name == "patch.conv")
    assert tuple(last.attributes["strides"].as_ints()) == (stride, stride)
    pixels = random_pixels(model.spec, 2)
    assert np.abs(run(graph, pixels) - torch_logits(model, pixels)).max() < FLOAT


@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("size", "patch", "in_chans", "last"),
    [
        ((32, 37), (16, 16), 3, (4, 2)),
        ((112, 30), (14, 14), 3, (7, 2)),
        ((16, 8), (4, 4), 1, (4, 1)),
        ((16, 5), (8, 5), 7, (2, 5)),
        ((37, 32), (18, 16), 3, (9, 8)),
        ((9, 8), (4, 4), 1, (4, 4)),
    ],
)
def test_patches_read_as_columns_compute_the_model(size, patch, in_chans, last, batch):
    """Also with pixels beyond the last patch, where no two neighbours fit, and where rows are no multiple of 16."""
    model = random_model(VitSpec(size, patch, in_chans, 12, (BlockSpec(1, 8, 8, 16),), num_classes=5))
    graph = lower(model, replace(PLAIN, patch="columns", patch_stride=4, batch=batch))
    pixels = random_pixels(model.spec, 1)
    first = model.spec.grid[0] * patch[0] % 16 != 0  # what RKNN does not reshape
    images = pixels if first else np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    assert list(graph.graph.inputs[0].shape)[1:] == [*images.shape[1:]]
    assert np.abs(run(graph, images) - torch_logits(model, pixels)).max() < FLOAT
    final = next(node for node in graph.graph if node.name == "patch.conv")
    assert tuple(final.attributes["strides"].as_ints()) == last
    flipped = np.ascontiguousarray(images[:, ::-1, ::-1])
    assert np.abs(run(graph, flipped) - torch_logits(model, pixels)).max() > 100 * FLOAT  # control


@pytest.mark.parametrize(("stride", "steps"), [(1, 4), (2, 3), (4, 1), (16, 0)])
def test_columns_are_halved_until_no_stride_is_larger_than_asked_for(stride, steps):
    """A stride of 1 leads nowhere by itself: the rows are halved four times."""
    model = random_model(VitSpec((32, 32), (16, 16), 3, 12, (BlockSpec(1, 8, 8, 16),), num_classes=5))
    graph = lower(model, replace(PLAIN, patch="columns", patch_stride=stride))
    pixels = random_pixels(model.spec, 1)
    assert sum("patch.rows" in node.name for node in graph.graph) == steps
    got = run(graph, np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)))
    assert np.abs(got - torch_logits(model, pixels)).max() < FLOAT


@pytest.mark.parametrize("name", ["token_avg", "distilled"])
@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_logits_as_a_map_are_the_same_numbers(name, batch):
    model = random_model(SPECS[name])
    graph, pixels = lower(model, replace(PLAIN, logits="map", batch=batch)), random_pixels(model.spec, 1)
    got = run(graph, pixels)
    assert got.shape == (1, model.spec.num_classes, 1, 1) and list(graph.graph.outputs[0].shape)[1:] == [*got.shape[1:]]
    assert np.abs(got[:, :, 0, 0] - torch_logits(model, pixels)).max() < FLOAT


@pytest.mark.parametrize("name", ["unequal widths", "token_avg", "swiglu", "gelu_tanh", "qk_norm"])
@pytest.mark.parametrize("opset", [13, 17, 18, 20, 21])
def test_every_opset_computes_the_model(name, opset):
    model = random_model(SPECS[name])
    graph = lower(model, replace(PLAIN, opset=opset))
    assert graph.graph.opset_imports == {"": opset}
    pixels = random_pixels(model.spec)
    assert np.abs(run(graph, pixels) - torch_logits(model, pixels)).max() < FLOAT


@pytest.mark.parametrize("changed", ["prefix", "pos", "patch.bias", "blocks.1.v.bias", "blocks.0.q.bias", "norm.bias"])
def test_the_comparison_sees_one_changed_weight(changed):
    model, pixels = random_model(), random_pixels(BASE)
    other = model.with_weights(BASE, {changed: model.weights[changed] * np.float32(1.1)})
    assert np.abs(run(lower(other, PLAIN), pixels) - torch_logits(model, pixels)).max() > 10 * FLOAT


def test_the_key_bias_is_rightly_absent():
    model, pixels = random_model(), random_pixels(BASE)
    other = model.with_weights(BASE, {"blocks.0.k.bias": model.weights["blocks.0.k.bias"] + np.float32(3)})
    assert np.abs(torch_logits(other, pixels) - torch_logits(model, pixels)).max() < FLOAT
    assert not any("k.bias" in name for name in lower(model, PLAIN).graph.initializers)
    normed = random_model(SPECS["qk_norm"])  # with a norm behind it, the bias matters and stays
    assert "blocks.0.k.bias" in lower(normed, PLAIN).graph.initializers


class Plain(torch.nn.Module):
    """The network without its tap argument, which an exporter cannot trace."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = to_torch(model)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.inner(pixels)


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize(("name", "dynamo"), [("unequal widths", True), ("distilled", False), ("swiglu", False)])
def test_graph_equals_what_torch_exports(name, dynamo, tmp_path):
    model = random_model(SPECS[name])
    pixels, path = random_pixels(model.spec, 1), tmp_path / "theirs.onnx"
    named = {"input_names": ["pixels"], "output_names": ["logits"], "opset_version": 20 if dynamo else 17}
    torch.onnx.export(Plain(model), (torch.from_numpy(pixels),), path, dynamo=dynamo, external_data=False, **named)
    theirs = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]
    assert np.abs(run(lower(model, PLAIN), pixels) - theirs).max() < FLOAT
    other = random_model(SPECS[name], seed=8)  # control: another model is another function
    assert np.abs(run(lower(other, PLAIN), pixels) - theirs).max() > 10 * FLOAT


def test_names_and_shapes_of_the_interface():
    proto = ir.to_proto(lower(random_model(), PLAIN)).graph
    (pixels,), (logits,) = proto.input, proto.output
    assert (pixels.name, logits.name) == ("pixels", "logits")
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (pixels, logits)]
    assert dims == [["batch", 3, 16, 16], ["batch", 7]]
    fixed = ir.to_proto(lower(random_model(), replace(PLAIN, batch="static"))).graph
    assert fixed.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_one_node_per_operation_and_names_that_fold_back():
    graph = lower(random_model(), PLAIN).graph
    assert [n.op_type for n in graph].count("LayerNormalization") == 5 and [n.op_type for n in graph].count("Gelu") == 2
    named = {n.name: n.op_type for n in graph}
    assert len(named) == len(list(graph)) and all(n.outputs[0].name for n in graph)
    assert named["blocks.1.fc1.matmul"] == "MatMul" and named["blocks.0.norm1"] == "LayerNormalization"
    places = {name.split(".")[0] for name in named}
    assert places == {"patch", "tokens", "blocks", "norm", "pool", "head", "logits"}


def test_only_the_tokens_a_head_reads_leave_the_last_block():
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(lower(random_model(), replace(PLAIN, batch="static"))))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    assert shapes["blocks.1.fc1.matmul"] == [1, 1, 28] and shapes["blocks.0.fc1.matmul"] == [1, 17, 20]
    assert shapes["blocks.1.k.matmul"] == [1, 17, 12]  # its keys and values still need every token


def test_same_model_same_bytes():
    for form, plan in ((PLAIN, None), (PLAIN, 1), (ORT, 1)):
        graphs = [
            lower(random_model(), form, minmax(random_model(), random_pixels(BASE)) if plan else None) for _ in range(2)
        ]
        first, second = (ir.to_proto(graph).SerializeToString(deterministic=True) for graph in graphs)
        assert first == second
    assert first != ir.to_proto(lower(random_model(seed=8), PLAIN)).SerializeToString(deterministic=True)


def test_lowering_a_base_model_takes_milliseconds_and_no_torch():
    """In a fresh interpreter: 86 million parameters under a second of processor time, torch never imported."""
    code = """
import json, sys, time, numpy as np
from compressor.types import *
from compressor.lower import lower
spec = VitSpec((224, 224), (16, 16), 3, 768, (BlockSpec(12, 64, 64, 3072),) * 12)
model = Model(spec, {n: np.zeros(s, np.float32) for n, s in spec.shapes().items()}, Preprocess((224, 224)))
start = time.process_time(); graph = lower(model, Capabilities("tokens", 20, ("fp32",)))
print(json.dumps([time.process_time() - start, "torch" in sys.modules, len(list(graph.graph))]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch_loaded, nodes = json.loads(out.stdout)
    assert seconds < 1.0 and not torch_loaded and nodes > 200


# ------------------------------------------------------------------ quantized


@pytest.mark.parametrize("name", sorted(SPECS))
def test_both_quantized_forms_compute_the_same(name):
    model = random_model(SPECS[name])
    pixels = random_pixels(model.spec)
    plan = minmax(model, pixels)
    qdq, integer = (
        lower(model, replace(PLAIN, patch="unshuffle"), plan),
        lower(model, replace(ORT, attention="matmul"), plan),
    )
    a, b = (run(graph, pixels) for graph in (qdq, integer))
    step = float(np.abs(a - torch_logits(model, pixels)).max())  # what quantization itself costs
    assert np.abs(a - b).max() <= 0.5 * step + 1e-6  # rounding boundaries crossed by float summation order, no more
    assert 1e-4 < step < 0.6
    linears = sum(1 for n in plan.weights)
    assert types(integer).count("MatMulIntegerToFloat") == linears
    assert types(qdq).count("DequantizeLinear") == linears + types(qdq).count("QuantizeLinear")


def test_a_site_is_quantized_once_and_shared():
    model = random_model()
    graph = lower(model, PLAIN, minmax(model, random_pixels(BASE)))
    inputs = [n.inputs[0].name for n in graph.graph if n.op_type == "QuantizeLinear"]
    assert inputs.count("blocks.0.norm1") == 1 and len(inputs) == 1 + 2 * 4 + 1
    assert not any("bias.quantize" in n.name for n in graph.graph)


def test_weights_are_stored_as_integers():
    model = random_model()
    graph = lower(model, ORT, minmax(model, random_pixels(BASE)))
    stored = graph.graph.initializers["blocks.0.fc1.weight"].const_value.numpy()
    assert stored.dtype == np.int8 and stored.shape == (24, 20)
    assert np.abs(stored).max() == 127
    weight, scale = model.weights["blocks.0.fc1.weight"], np.abs(model.weights["blocks.0.fc1.weight"]).max(1) / 127
    assert (stored == np.rint(weight / scale[:, None].astype(np.float32)).T).all()


def test_a_partial_plan_leaves_the_rest_in_float():
    model, pixels = random_model(), random_pixels(BASE)
    plan = minmax(model, pixels)
    some = Quantization({n: q for n, q in plan.weights.items() if "fc" in n}, plan.activations)
    graph = lower(model, ORT, some)
    assert types(graph).count("MatMulIntegerToFloat") == 4
    assert np.abs(run(graph, pixels) - torch_logits(model, pixels)).max() < 0.3


@pytest.mark.parametrize("form", ["plain", "unshuffle", "ort"])
def test_narrow_grids_saturate_where_the_grid_ends(form):
    model, pixels = random_model(), random_pixels(BASE)
    plan = minmax(model, pixels)
    narrow = {s: QParams(q.scale * np.float32(127 / 7 / 2), 0, 4) for s, q in plan.activations.items()}  # clips by half
    graph = lower(model, FORMS[form], Quantization(plan.weights, narrow))
    proto = ir.to_proto(graph)
    quantized = [n.output[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    kind = onnx.TensorProto.UINT8 if form == "ort" else onnx.TensorProto.INT8
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in quantized)
    found = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for values in found.run(quantized, {"pixels": pixels}):
        integers = values.astype(int) - (128 if form == "ort" else 0)
        assert integers.min() >= -8 and integers.max() == 7


def test_weight_integers_round_half_to_even_and_saturate():
    grid = QParams(np.asarray([2.0, 1.0], np.float32), 0, 4, axis=0)
    got = weight_integers(np.asarray([[1.0, 3.0, -5.0], [99.0, -99.0, 2.5]], np.float32), grid)
    assert got.tolist() == [[0, 2, -2], [7, -8, 2]]


def test_what_it_cannot_do_is_refused_in_a_sentence():
    model = random_model()
    plan = minmax(model, random_pixels(BASE))
    with pytest.raises(ConfigError, match="linear_inputs or integer_ops, got 'all_tensors'"):
        lower(model, replace(PLAIN, qdq="all_tensors"), plan)
    with pytest.raises(ConfigError, match="must be 'unshuffle', got 'conv'"):
        lower(model, replace(ORT, patch="conv"), plan)
    for patch in ("halving", "columns"):
        with pytest.raises(ConfigError, match=f"must be conv or unshuffle, got '{patch}'"):
            lower(model, replace(PLAIN, patch=patch), plan)
    with pytest.raises(ConfigError, match=r"all or none must be quantized, got \['blocks.0.k', 'blocks.0.v'\]"):
        lower(model, PLAIN, Quantization({n: q for n, q in plan.weights.items() if ".q." not in n}, plan.activations))
    per_channel = {s: QParams(np.ones(3, np.float32), 0, 8, axis=1) for s in plan.activations}
    with pytest.raises(ConfigError, match="'patch' must be per tensor, got axis 1"):
        lower(model, PLAIN, Quantization(plan.weights, per_channel))
    with pytest.raises(ConfigError, match=r"int8_scores of a graph with a grid for 'blocks.0.q' must be true"):
        lower(model, PLAIN, with_scores(plan, model, random_pixels(BASE)))
    with pytest.raises(
        ConfigError, match=r"attention of a graph with a grid for 'blocks.0.q' must be matmul, got 'fused'"
    ):
        lower(model, replace(ORT, int8_scores=True), with_scores(plan, model, random_pixels(BASE)))
    with pytest.raises(ConfigError, match="must be one of conv, tokens, got 'rows'"):
        lower(model, replace(PLAIN, layout="rows"))
