"""Networks in which every part matters, and one of which half is redundant, for the tests of the pruners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from compressor.types import BlockSpec, Model, Pool, Preprocess, VitSpec
from compressor.vit import build


def make(*blocks: BlockSpec, pool: Pool = "token", seed: int = 0) -> Model:
    """A network with weights large enough that every part matters."""
    spec = VitSpec((16, 16), (4, 4), 3, 24, blocks, num_classes=5, pool=pool, prefix_tokens=2)
    torch.manual_seed(seed)
    weights = {n: p.detach().numpy().copy() for n, p in build(spec).named_parameters()}
    rng = np.random.default_rng(seed)
    for name in ("pos", "prefix"):
        weights[name] = rng.standard_normal(weights[name].shape).astype(np.float32)
    for name in weights:
        if name.endswith(("q.weight", "k.weight", "fc1.weight")):
            weights[name] *= 3
    return Model(spec, weights, Preprocess((16, 16)))


def pixels(count: int = 12, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def redundant(hidden: int, halved: Mapping[str, int], *, mix: float) -> Model:
    """Hidden units in equal pairs; the second half of `halved` ({part: width}) is the first times a matrix of size `mix`."""
    block = BlockSpec(2, 16, 12, hidden)
    model = make(block, replace(block, mlp="swiglu"))
    weights, rng = {n: w.copy() for n, w in model.weights.items()}, np.random.default_rng(5)
    for i in range(2):
        for part in ("fc1", "gate") if i else ("fc1",):
            for kind in ("weight", "bias"):
                w = weights[f"blocks.{i}.{part}.{kind}"]
                w[hidden // 2 :] = w[: hidden // 2]
        for part, width in halved.items():
            mixing = mix * rng.standard_normal((width // 2, width // 2))
            for kind in ("weight", "bias"):
                w = weights[f"blocks.{i}.{part}.{kind}"].reshape(2, width, -1)
                w[:, width // 2 :] = mixing @ w[:, : width // 2]
    return replace(model, weights=weights)
