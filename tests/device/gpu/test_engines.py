"""Engines of both TensorRTs, built and run on the GPU of this machine."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from compressor.lower import lower
from compressor.quantize import simulate
from compressor.types import BuildOptions
from compressor.verify import check_parity, tolerance
from compressor.vit import to_torch
from targets import trt, trt_rtx
from tests.targets.networks import FAMILIES, LEVELS, PLAIN, grids, model, pixels

TARGETS = [
    pytest.param(t, marks=pytest.mark.skipif(find_spec(t.PACKAGE) is None, reason=f"{t.PACKAGE} is not in this Python"))
    for t in (trt, trt_rtx)
]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def logits(network, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return to_torch(network)(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_engine_computes_the_model(target, family, precision, level, tmp_path):
    spec = LEVELS[level](FAMILIES[family])
    network, images = model(spec), pixels(spec)
    session = target.open(target.build(lower(network, target.CAPABILITIES), BuildOptions(tmp_path, precision)))
    for batch in (images, images[:1]):  # the batch axis is free
        check_parity(logits(network, batch), session.run({"pixels": batch})["logits"], precision, target.NAME)


@pytest.mark.parametrize("width", [8, "e4m3"])
@pytest.mark.parametrize("target", TARGETS)
def test_quantized_engine_computes_what_is_simulated(target, width, tmp_path):
    if width == "e4m3" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    network, images = model(PLAIN), pixels(PLAIN)
    plan = grids(network, width)
    graph = lower(network, target.CAPABILITIES, plan)
    session = target.open(target.build(graph, BuildOptions(tmp_path, plan.precision)))
    with torch.inference_mode():
        expected = simulate(network, plan)(torch.from_numpy(images)).numpy()
    assert np.abs(session.run({"pixels": images})["logits"] - expected).max() < tolerance(expected, plan.precision)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_timed_under_the_graphs_names(target, tmp_path):
    session = target.open(target.build(lower(model(PLAIN), target.CAPABILITIES), BuildOptions(tmp_path, "fp16")))
    records = session.ops({"pixels": pixels(PLAIN, 1)})
    assert sum(record.time_ms for record in records) > 0
    assert any("blocks.0.fc1.matmul" in record.name for record in records)
