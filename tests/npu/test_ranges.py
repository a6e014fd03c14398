"""Our thresholds for compilers that quantize by themselves, against slow references; no compiler is needed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from compressor.lower import lower
from compressor.lower.graph import GraphBuilder
from targets import _ranges, bpu
from tests.npu.models import first_blocks, images, torch_logits


def run(graph: onnx_ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(graph).SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def small() -> onnx_ir.Model:
    """exp(-|x|) beside a transposed x, as softmax(scores - max) and its neighbours are."""
    g = GraphBuilder(11, 1)
    x = g.input("pixels", (4, 6))
    moved = g.op("moved", "Transpose", x, perm=(0, 2, 1))
    below = g.op("below", "Mul", g.op("size", "Abs", moved), g.floats("minus", -1.0))
    return g.finish("small", g.op("logits", "Exp", below), (6, 4))


def rounded(x: np.ndarray, end: float) -> np.ndarray:
    return np.clip(np.rint(x * 127 / end), -128, 127) * end / 127


def test_the_threshold_has_the_least_error_of_all_shares():
    """Every share is tried on the values themselves; control: the widest and the narrowest are worse."""
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    x[0] = 10.0
    counts, _ = np.histogram(np.abs(x), _ranges.BINS, (0, np.abs(x).max()))
    found = _ranges.Histogram(float(np.abs(x).max()), counts).threshold()
    ends = np.abs(x).max() * _ranges.SHARES
    errors = [((rounded(x, end) - x) ** 2).mean() for end in ends]
    assert found == pytest.approx(ends[int(np.argmin(errors))], rel=0.06)  # neighbouring shares are nearly as good
    assert ((rounded(x, found) - x) ** 2).mean() < 1.02 * min(errors) < 0.95 * min(errors[0], errors[-1])


def test_what_a_float_graph_computes_is_counted():
    model = first_blocks(1)
    x, graph = images(model, 3), lower(model, bpu.CAPABILITIES)
    seen = _ranges.observe(graph, x)
    assert np.abs(seen.logits - torch_logits(model, x)).max() < 1e-4  # float32 in another order
    assert seen.histograms["pixels"].largest == pytest.approx(np.abs(x).max())
    assert seen.histograms["blocks.0.scores"].counts.sum() == 3 * 3 * 50  # images, heads, keys; one query is read
    assert seen.histograms.keys() == {"pixels"} | {v.name for node in graph.graph for v in node.outputs}


def test_moved_values_keep_their_grid_and_an_exp_needs_no_more_than_it_can_show():
    x = 4 * np.random.default_rng(0).laplace(size=(60, 4, 6)).astype(np.float32)
    graph = small()
    seen = _ranges.observe(graph, x)
    ends = _ranges.thresholds(graph, seen)
    assert ends["moved"] == ends["pixels"] < np.abs(x).max()
    assert ends["below"] == _ranges.VANISHES < ends["size"]
    assert rounded(np.exp(-np.float64(_ranges.VANISHES)), 1.0) == 0 and rounded(np.exp(-5.0), 1.0) > 0
    near = _ranges.thresholds(graph, _ranges.observe(graph, x / 10))
    assert near["below"] == pytest.approx(np.abs(x).max() / 10)  # nothing to cut


def test_an_end_beyond_what_is_seen_is_cut():
    """As the mapper's for an Exp of values below zero, e to what is minus their least."""
    x = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    seen = _ranges.observe(small(), x)
    largest = {name: seen.histograms[name].largest for name in seen.histograms}
    ends = {"below": largest["below"], "logits": float(np.exp(largest["below"])), "pixels": 0.5, "minus": 1.0}
    cut = _ranges.attained(ends, seen)
    assert cut == {**ends, "logits": largest["logits"]} and cut["logits"] <= 1.0 < ends["logits"]


def test_a_grid_rounds_what_is_read_behind_it():
    x = np.random.default_rng(0).standard_normal((1, 4, 6)).astype(np.float32)
    graph = small()
    ends = {"pixels": 2.0, "below": 1.5, "minus": 1.0, "nothing of this name": 1.0}
    wanted = np.exp(rounded(-np.abs(rounded(x, 2.0)), 1.5)).transpose(0, 2, 1)
    assert np.abs(run(_ranges.with_grids(graph, ends), x) - wanted).max() < 1e-6
    assert np.abs(run(graph, x) - wanted).max() > 1e-3  # control: without grids
    assert np.array_equal(run(_ranges.with_grids(graph, {}), x), run(graph, x))
    assert [n.op_type for n in graph.graph] == ["Transpose", "Abs", "Mul", "Exp"]  # a copy was changed


def test_a_wide_grid_is_the_mappers_own_node():
    """`tests/npu/test_bpu.py` has the mapper compute it; control: the names beside it stay int8."""
    graph = small()
    proto = onnx_ir.to_proto(_ranges.with_grids(graph, {"pixels": 2.0, "below": 1.5}, wide={"below"}))
    zeros = {i.name: onnx.numpy_helper.to_array(i).dtype for i in proto.graph.initializer}
    scales = {
        i.name: float(onnx.numpy_helper.to_array(i)) for i in proto.graph.initializer if i.name.endswith(".scale")
    }
    kinds = {n.output[0]: (n.domain, n.op_type, zeros[n.input[2]]) for n in proto.graph.node if "uantize" in n.op_type}
    assert kinds == {
        "pixels.quantize": ("", "QuantizeLinear", np.int8),
        "pixels.dequantize": ("", "DequantizeLinear", np.int8),
        "below.quantize": ("horizon", "HzQuantize", np.int16),
        "below.dequantize": ("horizon", "HzDequantize", np.int16),
    }
    assert scales == pytest.approx({"pixels.scale": 2.0 / 127, "below.scale": 1.5 / 32767})
    assert [o.domain for o in proto.opset_import] == ["", "horizon"]
