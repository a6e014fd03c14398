"""Engines of both TensorRTs, built and run on the GPU of this machine."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from compressor.lower import lower
from compressor.types import BuildOptions
from compressor.verify import check_parity
from compressor.vit import to_torch
from targets import trt, trt_rtx
from tests.targets.networks import FAMILIES, PLAIN, model, pixels, pruned

TARGETS = [
    pytest.param(t, marks=pytest.mark.skipif(find_spec(t.PACKAGE) is None, reason=f"{t.PACKAGE} is not in this Python"))
    for t in (trt, trt_rtx)
]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


def logits(network, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return to_torch(network)(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("level", ["dense", "pruned"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_engine_computes_the_model(target, family, precision, level, tmp_path):
    spec = FAMILIES[family] if level == "dense" else pruned(FAMILIES[family])
    network, images = model(spec), pixels(spec)
    session = target.open(target.build(lower(network, target.CAPABILITIES), BuildOptions(tmp_path, precision)))
    for batch in (images, images[:1]):  # the batch axis is free
        check_parity(logits(network, batch), session.run({"pixels": batch})["logits"], precision, target.NAME)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_timed_under_the_graphs_names(target, tmp_path):
    session = target.open(target.build(lower(model(PLAIN), target.CAPABILITIES), BuildOptions(tmp_path, "fp16")))
    records = session.ops({"pixels": pixels(PLAIN, 1)})
    assert sum(record.time_ms for record in records) > 0
    assert any("blocks.0.fc1.matmul" in record.name for record in records)
