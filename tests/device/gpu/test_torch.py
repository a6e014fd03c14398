"""The network and the pruning pass on a CUDA device compute what they compute on the CPU."""

import numpy as np
import pytest
import torch

from calibration.observe import ObservePlan, observe
from compressor.prune import configure, prune
from compressor.vit import to_torch
from tests.targets.networks import FAMILIES, PLAIN, model, pixels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_pass(family):
    network, images = model(FAMILIES[family]), torch.from_numpy(pixels(FAMILIES[family]))
    with torch.inference_mode():
        expected, got = to_torch(network)(images), to_torch(network, "cuda")(images.cuda()).cpu()
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4  # float32 sums in another order


def test_pruned_model_computes_the_same_whichever_device_pruned_it():
    network, images = model(PLAIN), pixels(PLAIN, 64)
    config = configure("corp", {"mlp_ratio": 0.5, "qk_ratio": 0.5})
    logits = {}
    for device in ("cpu", "cuda"):
        small = prune(network, lambda: [images], config, lambda m, b: observe(m, b, ObservePlan()), device).model
        logits[device] = to_torch(small)(torch.from_numpy(images)).numpy()
    dense = to_torch(network)(torch.from_numpy(images)).numpy()
    change = np.linalg.norm(logits["cpu"] - dense)
    assert change > 0
    assert np.linalg.norm(logits["cuda"] - logits["cpu"]) < 1e-2 * change  # rounding is small beside what pruning does
