"""8-bit floats: the grid, the graph, and that both are the model, without a GPU.

ONNX Runtime's CPU and the reference evaluator of the onnx package execute FLOAT8E4M3FN QuantizeLinear; what TensorRT makes
of the same graph is in test_trt_rtx.py.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import targets
from calibration.data import batches, open_images
from calibration.observe import ObservePlan, observe
from compressor.checkpoint import load
from compressor.errors import ConfigError
from compressor.lower import lower
from compressor.lower.qdq import weight_integers
from compressor.quantize import quantize, simulate
from compressor.quantize.grid import fake_quant, fake_quant_torch, rounded, symmetric
from compressor.quantize.plan import for_target
from compressor.types import BuildOptions, Model, QParams, Quantization
from compressor.verify import AGREEMENT_FLOOR, parity
from compressor.vit import to_torch
from targets import _tensorrt, trt
from tests.targets.networks import PLAIN, grids, model, pixels

NUMBERS = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))
NUMBERS = NUMBERS[np.isfinite(NUMBERS)]  # all there are, ascending, -448 to 448


# --------------------------------------------------------------------------- the grid


def nearest(x: np.ndarray) -> np.ndarray:
    """By looking at every number there is; between two equally near, the one whose last mantissa bit is 0."""
    away = np.abs(x[:, None] - NUMBERS)
    odd = NUMBERS.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) & 1
    return NUMBERS[np.lexsort((np.broadcast_to(odd, away.shape), away), axis=1)[:, 0]]


def test_rounding_is_to_the_nearest_number_there_is():
    rng = np.random.default_rng(0)
    halves = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    x = np.concatenate([NUMBERS, halves, rng.normal(0, 1, 500), rng.normal(0, 100, 500), [1e-9, -1e-9, 500.0, -1e30]])
    x = x.astype(np.float32).astype(np.float64)
    assert np.array_equal(rounded(torch.from_numpy(x.astype(np.float32))).numpy(), nearest(x))
    assert not np.array_equal(rounded(torch.from_numpy(x * 1.05)).numpy(), nearest(x))  # control


def test_numpy_and_torch_and_file_hold_the_same_numbers():
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 0.1, (24, 50)).astype(np.float32)
    q = symmetric(np.abs(weight).max(1), "e4m3", axis=0)
    rows = fake_quant(weight, q)
    assert np.array_equal(rows, fake_quant_torch(torch.from_numpy(weight), q).numpy())
    assert np.array_equal(weight_integers(weight, q).astype(np.float32) * q.scale[:, None], rows)
    assert np.array_equal(weight_integers(rows, q), weight_integers(weight, q))  # a second time changes nothing
    error = np.abs(rows - weight) / np.abs(weight)
    assert 0.02 < error[np.abs(weight) > 0.01].max() <= 2**-4  # half of the last of four bits
    assert np.abs(rows).max() == pytest.approx(np.abs(weight).max())


def test_zero_point_or_groups_are_refused():
    with pytest.raises(ConfigError, match="zero point 3"):
        QParams(np.float32(0.1), 3, "e4m3")
    with pytest.raises(ConfigError, match="group 8"):
        QParams(np.ones((4, 2), np.float32), 0, "e4m3", axis=0, group=8)


# --------------------------------------------------------------------------- the graph


def onnx_runtime(graph: onnx_ir.Model, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # it would fuse pairs into operators of integers
    proto = onnx_ir.to_proto(graph).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(None, {"pixels": images})[0]


def reference_evaluator(graph: onnx_ir.Model, images: np.ndarray) -> np.ndarray:
    return ReferenceEvaluator(onnx_ir.to_proto(graph)).run(None, {"pixels": images})[0]


def simulated(network: Model, plan: Quantization, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return simulate(network, plan)(torch.from_numpy(images)).numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("run", [onnx_runtime, reference_evaluator])
def test_graph_computes_what_torch_simulates(run: Callable[[onnx_ir.Model, np.ndarray], np.ndarray]):
    network = model(PLAIN)
    plan = grids(network, "e4m3")
    graph, images = lower(network, trt.CAPABILITIES, plan), pixels(PLAIN)
    expected = simulated(network, plan, images)
    assert distance(run(graph, images), expected) < 1e-3  # float32 sums in another order
    other = replace(plan, activations={**plan.activations, "blocks.0.fc1": QParams(np.float32(0.0113), 0, "e4m3")})
    assert distance(simulated(network, other, images), expected) > 5e-3  # control: one grid of eight, 0.4 % off


def test_graph_holds_8_bit_floats_around_linears_only():
    network = model(PLAIN)
    graph = lower(network, trt.CAPABILITIES, grids(network, "e4m3"))
    kinds = {v.name: v.dtype.name for v in graph.graph.initializers.values() if v.dtype is not None}
    assert {name for name, kind in kinds.items() if kind == "FLOAT8E4M3FN" and name.endswith(".weight")} == {
        "head.weight",
        *(f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("q", "k", "v", "proj", "fc1", "fc2")),
    }
    assert kinds["patch.weight"] == "FLOAT"  # a convolution: TensorRT has no kernel for it
    assert not any(kind == "INT8" for kind in kinds.values())
    half = _tensorrt.typed(graph, "fp8")
    assert {v.dtype.name for v in half.graph.initializers.values()} == {"FLOAT8E4M3FN", "FLOAT16", "INT64"}
    assert distance(onnx_runtime(half, pixels(PLAIN)), onnx_runtime(graph, pixels(PLAIN))) < 0.1


def test_target_says_which_weights():
    assert for_target(trt.CAPABILITIES, "fp8").skip == ("patch.weight",)
    assert for_target(replace(trt.CAPABILITIES, patch="unshuffle"), "fp8").skip == ()


def test_integer_operators_refuse_8_bit_floats():
    network = model(PLAIN)
    with pytest.raises(ConfigError, match="linear_inputs"):
        lower(network, targets.get("ort").CAPABILITIES, grids(network, "e4m3"))


# --------------------------------------------------------------------------- the demo, and who runs it


def test_demo_gives_the_same_classes_in_8_bit_floats():
    """On calibration images, half of them unseen by the grids: simulated, and as the graph TensorRT gets."""
    torch.set_num_threads(1)
    demo = load("demo")
    seen, unseen = batches(open_images("demo", limit=128), demo.preprocess, 64)
    stats = observe(to_torch(demo), [seen], ObservePlan())
    plan = quantize(demo, stats, for_target(trt.CAPABILITIES, "fp8"))
    with torch.inference_mode():
        exact = to_torch(demo)(torch.from_numpy(unseen)).numpy()
    graph = onnx_runtime(_tensorrt.typed(lower(demo, trt.CAPABILITIES, plan), "fp8"), unseen)
    for got in (simulated(demo, plan, unseen), graph):
        found = parity(exact, got)
        assert found.agreement >= AGREEMENT_FLOOR["fp8"] and found.cosine > 0.999
        assert distance(got, exact) > 1e-3  # it did round
    wrong = {site: replace(q, scale=q.scale * np.float32(1e-3)) for site, q in plan.activations.items()}
    broken = simulated(demo, replace(plan, activations=wrong), unseen)  # control: everything beyond the largest number
    assert parity(exact, broken).agreement < AGREEMENT_FLOOR["fp8"]


@pytest.mark.parametrize("name", ["ort", "openvino", "null"])
def test_targets_without_8_bit_floats_say_so(name: str, tmp_path: Path):
    target = targets.get(name)
    graph = lower(model(PLAIN), target.CAPABILITIES)
    with pytest.raises(ConfigError, match=rf"Precision of target '{name}' must be one of fp32.*, got 'fp8'"):
        target.build(graph, BuildOptions(tmp_path, "fp8"))


CHIPS = {"tensorrt": (("ampere+",), ("", "version+")), "tensorrt-rtx": (("SM75", "SM86"), ("", "SM89", "SM120"))}


@pytest.mark.parametrize("name", CHIPS)
def test_chips_without_8_bit_floats_are_refused(name: str, tmp_path: Path):
    network, target = model(PLAIN), targets.get(name)
    without, having = CHIPS[name]
    graph = lower(network, target.CAPABILITIES, grids(network, "e4m3"))
    for chip in without:
        with pytest.raises(ConfigError, match=re.escape(f"must be SM89 or later for fp8, got '{chip}'")):
            target.plan(graph, BuildOptions(tmp_path, "fp8", chip=chip))
    assert not list(tmp_path.iterdir())
    for chip in having:
        assert target.plan(graph, BuildOptions(tmp_path, "fp8", chip=chip)).precision == "fp8"
    assert target.plan(lower(network, target.CAPABILITIES), BuildOptions(tmp_path, "fp16", chip=without[0])).size_bytes
