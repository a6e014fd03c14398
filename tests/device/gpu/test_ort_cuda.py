"""ONNX Runtime's GPU providers compute the model, on the GPU of this machine."""

import numpy as np
import pytest
import torch

import targets
from compressor.lower import lower
from compressor.types import BuildOptions
from compressor.verify import check_parity
from compressor.vit import to_torch
from targets import ort_cuda
from tests.targets.networks import FAMILIES, LEVELS, model, pixels

STATE = ort_cuda.available()
pytestmark = pytest.mark.skipif(not STATE.available, reason=f"{STATE.reason}; {STATE.fix}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ort_cuda.CAPABILITIES.precisions)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_provider_computes_the_model_on_the_gpu(family, precision, level, tmp_path):
    spec = LEVELS[level](FAMILIES[family])
    network, images = model(spec), pixels(spec)
    with torch.inference_mode():
        expected = to_torch(network)(torch.from_numpy(images)).numpy()
    made = ort_cuda.build(lower(network, ort_cuda.CAPABILITIES), BuildOptions(tmp_path, precision))
    for variant in targets.variants("ort-cuda", made):
        session = ort_cuda.open(variant)
        got = session.run({"pixels": images})["logits"]
        check_parity(expected, got, precision, f"ort-cuda {variant.settings['provider']}")
        placed = {record.placement for record in session.ops({"pixels": images})}
        assert placed and "CPU" not in placed
        assert np.isfinite(got).all()
