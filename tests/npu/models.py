"""Small models with trained weights and real images, for compilers that take minutes on a whole network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibration import data
from compressor import checkpoint
from compressor.stages import torch_logits
from compressor.types import Array, Model

__all__ = ["cosine", "first_blocks", "images", "torch_logits", "uneven"]


def first_blocks(count: int) -> Model:
    """The embedded model with its first blocks only: trained weights, meaningless classes."""
    model = checkpoint.load("demo")
    return model.with_weights(replace(model.spec, blocks=model.spec.blocks[:count]), {})


def uneven(model: Model, size: float = 40.0) -> Model:
    """`model` with `size` added to four channels of every position: a residual stream that int8 rounds badly."""
    weights = {name: np.array(model.weights[name]) for name in ("pos", "prefix")}
    for table in weights.values():
        table[:, :4] += size
    return model.with_weights(model.spec, weights)


def images(model: Model, count: int, name: str = "demo") -> Array:
    """The first embedded calibration images (``demo:eval``: evaluation images), preprocessed."""
    return np.concatenate(list(data.batches(data.open_images(name, limit=count), model.preprocess, count)))[:count]


def cosine(a: Array, b: Array) -> float:
    """The smallest cosine between rows."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
