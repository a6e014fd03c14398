"""The convolutional layout: every fold against plain linear algebra, every graph against the torch module."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from compressor.errors import ConfigError
from compressor.lower import conv_folds as folds
from compressor.lower import lower
from compressor.types import BlockSpec, Capabilities, Model, Preprocess, Quantization, VitSpec
from compressor.vit import to_torch

EXACT = 1e-10  # float64: only the order of additions differs
FLOAT = 1e-4  # float32, on logits of order 1


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """(tokens, C), the definition."""
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps) * scale + shift


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def conv(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | float = 0.0, groups: int = 1) -> np.ndarray:
    """(C, 1, T) through a 1 x k convolution, by torch in float64; returns (out, T')."""
    out = torch.nn.functional.conv2d(torch.from_numpy(x)[None], torch.from_numpy(kernel), groups=groups)
    return out[0, :, 0].numpy() + np.reshape(bias, (-1, 1))


# ------------------------------------------------------------------ folds


def test_centre_leaves_what_a_layer_norm_sees():
    r = rng()
    weight, bias, x = r.normal(size=(12, 5)), r.normal(size=12), r.normal(size=(9, 5))
    scale, shift = r.normal(size=12), r.normal(size=12)
    centred_weight, centred_bias = folds.centre(weight, bias)
    stream = x @ centred_weight.T + centred_bias
    assert np.abs(stream.mean(1)).max() < EXACT
    want = layer_norm(x @ weight.T + bias, scale, shift)
    short = stream / np.sqrt((stream**2).mean(1, keepdims=True) + 1e-6) * scale + shift
    assert np.abs(short - want).max() < EXACT
    uncentred = x @ weight.T + bias  # control: without the fold the short form is wrong
    assert np.abs(uncentred / np.sqrt((uncentred**2).mean(1, keepdims=True)) * scale + shift - want).max() > 0.1


def test_centre_takes_a_patch_kernel():
    weight = rng().normal(size=(6, 3, 4, 4))
    centred, _ = folds.centre(weight, np.zeros(6))
    assert centred.shape == weight.shape and np.abs(centred.mean(0)).max() < EXACT


def test_absorb_affine_is_the_affine_before_the_linear():
    r = rng()
    weight, bias, n = r.normal(size=(4, 6)), r.normal(size=4), r.normal(size=(9, 6))
    scale, shift = r.normal(size=6), r.normal(size=6)
    w, b = folds.absorb_affine(weight, bias, scale, shift)
    assert np.abs(n @ w.T + b - ((n * scale + shift) @ weight.T + bias)).max() < EXACT


def test_centre_heads_centres_each_head_alone():
    r = rng()
    weight, bias, x = r.normal(size=(6, 5)), r.normal(size=6), r.normal(size=(9, 5))
    w, b = folds.centre_heads(weight, bias, 2)
    got, plain = (x @ w.T + b).reshape(9, 2, 3), (x @ weight.T + bias).reshape(9, 2, 3)
    assert np.abs(got - (plain - plain.mean(2, keepdims=True))).max() < EXACT
    assert (
        np.abs(folds.centre(weight, bias)[0] - w).max() > 0.01
    )  # control: centring all heads at once is another thing


def test_key_scale_into_query_leaves_the_softmax():
    r = rng()
    q, k = r.normal(size=(7, 4)), r.normal(size=(9, 4))
    gq, bq, gk, bk = r.normal(size=(4, 4))
    scale, shift = folds.key_scale_into_query(gq, bq, gk)
    want = softmax((q * gq + bq) @ (k * gk + bk).T)
    assert np.abs(softmax((q * scale + shift) @ k.T) - want).max() < EXACT
    assert np.abs(softmax((q * scale + bq) @ k.T) - want).max() > 1e-3


def test_any_bias_of_k_leaves_the_softmax():
    r = rng()
    q, k, bias = r.normal(size=(7, 4)), r.normal(size=(9, 4)), r.normal(size=4)
    assert np.abs(softmax(q @ (k + bias).T) - softmax(q @ k.T)).max() < EXACT
    assert np.abs(softmax((q + bias) @ k.T) - softmax(q @ k.T)).max() > 1e-3  # control: a bias of q does not


def test_value_bias_passes_through_attention():
    r = rng()
    weight, bias, value_bias = r.normal(size=(6, 4)), r.normal(size=6), r.normal(size=4)
    attention, v = softmax(r.normal(size=(7, 9))), r.normal(size=(9, 4))
    want = (attention @ (v + value_bias)) @ weight.T + bias
    got = (attention @ v) @ weight.T + folds.value_bias_into_projection(weight, bias, value_bias)
    assert np.abs(got - want).max() < EXACT


def test_kernel_is_the_linear():
    r = rng()
    weight, bias, x = r.normal(size=(4, 6)), r.normal(size=4), r.normal(size=(9, 6))
    got = conv(x.T[:, None, :].copy(), folds.kernel(weight), bias)
    assert np.abs(got.T - (x @ weight.T + bias)).max() < EXACT


def test_mean_kernel_averages_per_group_spread_or_not():
    x = rng().normal(size=(6, 1, 9))
    want = x.reshape(2, 3, 9).mean(1)
    assert np.abs(conv(x, folds.mean_kernel(2, 3, spread=False), groups=2) - want).max() < EXACT
    assert np.abs(conv(x, folds.mean_kernel(2, 3, spread=True)) - np.repeat(want, 3, axis=0)).max() < EXACT


def test_patch_kernel_follows_space_to_depth():
    r = rng()
    weight, image = r.normal(size=(5, 3, 4, 4)), r.normal(size=(3, 8, 12))
    want = torch.nn.functional.conv2d(torch.from_numpy(image)[None], torch.from_numpy(weight), stride=4)[0].numpy()
    cut = image.reshape(3, 2, 4, 3, 4).transpose(2, 4, 0, 1, 3).reshape(48, 2, 3)  # ONNX: out channels run (y, x, in)
    got = np.einsum("oi,ihw->ohw", folds.patch_kernel(weight)[:, :, 0, 0], cut)
    assert np.abs(got - want).max() < EXACT


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (4, 1), (1, 3), (1, 1)])
def test_an_unshuffling_kernel_is_space_to_depth(rows, cols):
    image = rng().normal(size=(3, 4, 6))
    cut = image.reshape(3, 4 // rows, rows, 6 // cols, cols).transpose(2, 4, 0, 1, 3)  # out channels run (y, x, in)
    cut = cut.reshape(3 * rows * cols, 4 // rows, 6 // cols)
    assert np.array_equal(folds.unshuffle(image, rows, cols), cut)
    kernel = torch.from_numpy(folds.unshuffle_kernel(3, rows, cols))
    got = torch.nn.functional.conv2d(torch.from_numpy(image)[None], kernel, stride=(rows, cols))
    assert np.array_equal(got[0].numpy(), cut)


def test_side_by_side_pixels_of_an_image_with_channels_last_are_its_unshuffled_columns():
    """What the patch form "columns" gets from a reshape; control: with channels first it is something else."""
    image = rng().normal(size=(3, 4, 6))
    last = image.transpose(1, 2, 0).reshape(4, 3, 6).transpose(2, 0, 1)
    assert np.array_equal(last, folds.unshuffle(image, 1, 2))
    assert not np.array_equal(image.reshape(6, 4, 3), folds.unshuffle(image, 1, 2))


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (3, 1), (1, 4)])
def test_an_unshuffled_kernel_on_an_unshuffled_image_is_the_strided_convolution(rows, cols):
    r = rng()
    weight, image = r.normal(size=(5, 3, 6, 4)), r.normal(size=(1, 3, 12, 8))
    want = torch.nn.functional.conv2d(torch.from_numpy(image), torch.from_numpy(weight), stride=(6, 4))
    small = (torch.from_numpy(folds.unshuffle(part, rows, cols)) for part in (image, weight))
    assert (torch.nn.functional.conv2d(*small, stride=(6 // rows, 4 // cols)) - want).abs().max() < EXACT


def test_head_kernel_reads_tokens_side_by_side():
    r = rng()
    weight, x = r.normal(size=(5, 2 * 6)), r.normal(size=(2, 6))
    got = conv(x.T[:, None, :].copy(), folds.head_kernel(weight, 2))
    assert np.abs(got[:, 0] - weight @ x.reshape(-1)).max() < EXACT


# ------------------------------------------------------------------ graphs


SPEC = VitSpec((16, 16), (4, 4), 3, 12, (BlockSpec(2, 4, 6, 10), BlockSpec(3, 3, 5, 14)), num_classes=5)
RDK = Capabilities("conv", 11, ("fp32",), norm="conv", gelu="erf", qdq="none", batch="static")


def model(spec: VitSpec) -> Model:
    """Every parameter random; none at the value that would hide a missing term."""
    r = rng()
    weights = {name: (0.4 * r.normal(size=shape)).astype(np.float32) for name, shape in spec.shapes().items()}
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    return Model(spec, weights, Preprocess(spec.image_size, mean=(0.5,) * 3, std=(0.5,) * 3))


def blocks(**changes: object) -> VitSpec:
    return replace(SPEC, blocks=tuple(replace(b, **changes) for b in SPEC.blocks))  # type: ignore[arg-type]


SPECS = {
    "unequal widths": SPEC,
    "no classifier": replace(SPEC, num_classes=0),
    "odd image": replace(SPEC, image_size=(18, 17)),
    "one channel": replace(SPEC, in_chans=1),
    "registers": replace(SPEC, prefix_tokens=4),
    "avg, no prefix": replace(SPEC, prefix_tokens=0, pool="avg"),
    "avg": replace(SPEC, pool="avg"),
    "norm after pool": replace(SPEC, pool="avg", norm_after_pool=True),
    "distilled": replace(SPEC, prefix_tokens=2, pool="token_dist"),
    "distilled, no classifier": replace(SPEC, prefix_tokens=2, pool="token_dist", num_classes=0),
    "token_avg": replace(SPEC, pool="token_avg"),
    "token_avg, no classifier": replace(SPEC, pool="token_avg", num_classes=0),
    "gelu_tanh": blocks(mlp="gelu_tanh"),
    "quick_gelu": blocks(mlp="quick_gelu"),
    "swiglu": blocks(mlp="swiglu"),
    "qk_norm": blocks(qk_norm=True),
}


def run(graph: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"pixels": one[None]})[0] for one in x])


def torch_logits(m: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return to_torch(m)(torch.from_numpy(x)).numpy()


def pixels(spec: VitSpec) -> np.ndarray:
    return rng().normal(size=(2, spec.in_chans, *spec.image_size)).astype(np.float32)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("softmax_form", ["node", "exp"])
def test_graph_computes_the_model(name, softmax_form):
    m = model(SPECS[name])
    x = pixels(m.spec)
    got = run(lower(m, replace(RDK, softmax=softmax_form)), x)
    assert np.abs(got - torch_logits(m, x)).max() < FLOAT


@pytest.mark.parametrize(
    ("opset", "batch", "patch"), list(product((11, 13, 20), ("static", "dynamic"), ("conv", "unshuffle", "halving")))
)
def test_opset_batch_and_patch_form_change_nothing(opset, batch, patch):
    m = model(SPECS["odd image"])
    x = pixels(m.spec)
    form = replace(RDK, opset=opset, batch=batch, patch=patch, gelu="node", softmax="exp")
    graph = lower(m, form)
    assert graph.graph.opset_imports == {"": opset}
    assert np.abs(run(graph, x) - torch_logits(m, x)).max() < FLOAT


def test_a_free_batch_axis_takes_several_images():
    m = model(SPEC)
    x = pixels(SPEC)
    for form in ("node", "exp"):
        proto = ir.to_proto(lower(m, replace(RDK, batch="dynamic", softmax=form))).SerializeToString()
        session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
        assert np.abs(session.run(None, {"pixels": x})[0] - torch_logits(m, x)).max() < FLOAT


def test_the_tanh_form_is_close_and_visibly_another_function():
    m = model(SPEC)
    x = pixels(SPEC)
    error = np.abs(run(lower(m, replace(RDK, gelu="tanh")), x) - torch_logits(m, x)).max()
    assert FLOAT < error < 0.05  # 5e-4 per unit, summed over hidden units


def test_the_comparison_sees_one_changed_weight():
    m = model(SPEC)
    changed = m.with_weights(SPEC, {"blocks.1.v.bias": m.weights["blocks.1.v.bias"] + 0.1})
    x = pixels(SPEC)
    assert np.abs(run(lower(changed, RDK), x) - torch_logits(m, x)).max() > 100 * FLOAT


def test_the_graph_is_four_dimensional_and_small():
    """What makes the compiler keep it whole: no rank 5, no Gather or Split, no -1, three transposes, four nodes per norm."""
    graph = lower(model(SPEC), replace(RDK, softmax="exp"))
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(graph), strict_mode=True)
    constants = graph.graph.initializers
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in proto.graph.value_info if v.name not in constants}
    assert set(ranks.values()) == {4} and len(ranks) > 40
    types = [node.op_type for node in graph.graph]
    assert not {"Gather", "Split", "ReduceMean", "Softmax"} & set(types)
    assert types.count("Transpose") == 3 * len(SPEC.blocks) and types.count("Pow") == 2 * len(SPEC.blocks) + 1
    shapes = [v.const_value.numpy() for n, v in constants.items() if n.endswith(".shape")]
    assert shapes and all((shape > 0).all() for shape in shapes)
    assert "blocks.0.k.bias" not in lower(model(SPEC), RDK).graph.initializers


def test_only_the_tokens_a_head_reads_leave_the_last_block():
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(lower(model(SPEC), RDK)), strict_mode=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    assert shapes["blocks.1.fc1.conv"] == [1, 14, 1, 1] and shapes["blocks.0.fc1.conv"] == [1, 10, 1, 17]


def test_logits_as_a_map_need_no_reshape():
    m = model(SPEC)
    graph = lower(m, replace(RDK, logits="map"))
    x = pixels(SPEC)
    got = run(graph, x)
    assert (
        got.shape == (2, 5, 1, 1)
        and graph.graph.outputs[0].name == "logits"
        and list(graph.graph)[-1].op_type == "Conv"
    )
    assert np.abs(got[:, :, 0, 0] - torch_logits(m, x)).max() < FLOAT


def test_poolings_end_in_one_value_and_none_is_wide():
    for count in range(1, 1200):
        left = count
        for window in folds.pooling_windows(count):
            left = -(-left // window)
        assert left == 1 and max(folds.pooling_windows(count)) <= 16


def test_the_largest_score_is_pooled_in_pairs_first():
    m = model(replace(SPEC, image_size=(36, 36)))  # 82 tokens: 41, 21 and 11 after pairs
    graph = lower(m, replace(RDK, softmax="exp"))
    pools = [n for n in graph.graph if n.op_type == "MaxPool" and n.name.startswith("blocks.0.")]
    assert [tuple(n.attributes["kernel_shape"].as_ints()) for n in pools] == [(1, 2), (1, 2), (1, 2), (1, 11)]
    x = pixels(m.spec)
    assert np.abs(run(graph, x) - torch_logits(m, x)).max() < FLOAT


def test_a_constant_row_among_the_values_is_the_sum_of_a_row():
    """V softmax(s) from V e and c 1 e; control: the sum of another head."""
    r = rng()
    weight, x, scores = r.normal(size=(6, 5)), r.normal(size=(5, 9)), r.normal(size=(2, 9, 9))
    wide, sums, c = folds.with_sums(weight, 2)
    values = (wide @ x + sums[:, None]).reshape(2, 4, 9)
    e = np.exp(scores).transpose(0, 2, 1)
    o = values @ e
    want = (weight @ x).reshape(2, 3, 9) @ softmax(scores).transpose(0, 2, 1)
    assert np.abs(c * o[:, :3] / o[:, 3:] - want).max() < EXACT
    assert np.abs(c * o[:, :3] / o[::-1, 3:] - want).max() > 0.01


@pytest.mark.parametrize("silent", ["blocks.0.v.weight", "blocks.0.norm1.weight"])
def test_values_that_are_all_zero_divide_by_no_zero(silent):
    m = model(SPEC).with_weights(SPEC, {silent: np.zeros_like(model(SPEC).weights[silent])})
    x = pixels(SPEC)
    got, want = run(lower(m, replace(RDK, softmax="exp")), x), torch_logits(m, x)
    assert np.abs(got - want).max() < FLOAT < np.abs(want - torch_logits(model(SPEC), x)).max()


def test_exp_does_not_overflow():
    """Scores of several hundred: exp of them is infinite in float32, exp of their distance to the largest is not."""
    loud = {f"blocks.0.{p}.weight": 40 * model(SPEC).weights[f"blocks.0.{p}.weight"] for p in "qk"}
    m = model(SPEC).with_weights(SPEC, loud)
    x = pixels(SPEC)
    got = run(lower(m, replace(RDK, softmax="exp")), x)
    assert np.abs(got - torch_logits(m, x)).max() < 100 * FLOAT  # scores of 1e3 carry errors of 1e-4 themselves


def test_same_model_same_bytes():
    first, second = (ir.to_proto(lower(model(SPEC), RDK)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_what_it_cannot_do_is_refused_in_a_sentence():
    m = model(SPEC)
    with pytest.raises(ConfigError, match="must be lowered in float"):
        lower(m, RDK, Quantization({}, {}))
    with pytest.raises(ConfigError, match="at least 11, got 10"):
        lower(m, replace(RDK, opset=10))
    with pytest.raises(ConfigError, match="must be conv, unshuffle or halving, got 'columns'"):
        lower(m, replace(RDK, patch="columns"))
    oblong = model(replace(SPEC, patch_size=(4, 8)))
    with pytest.raises(ConfigError, match=r"must be square for patch form 'unshuffle', got \(4, 8\)"):
        lower(oblong, replace(RDK, patch="unshuffle"))
    for patch in ("conv", "halving"):
        x = pixels(oblong.spec)
        assert np.abs(run(lower(oblong, replace(RDK, patch=patch)), x) - torch_logits(oblong, x)).max() < FLOAT
