"""Quantization simulated in float: weights on their grid, activations rounded by a tap. Runs wherever torch runs.

The integer graph computes the same products exactly and accumulates in int32, so the two agree up to float32 summation
order, which can move a later activation by at most one quantization step where it lies on a rounding boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from compressor.quantize.grid import fake_quant, fake_quant_torch
from compressor.types import Model, QParams, Quantization
from compressor.vit import Tap, to_torch

__all__ = ["fake_quant_tap", "on_grid", "simulate"]


def on_grid(model: Model, weights: Mapping[str, QParams]) -> Model:
    """`model` with every listed weight rounded to its grid."""
    return model.with_weights(model.spec, {name: fake_quant(model.weights[name], q) for name, q in weights.items()})


def fake_quant_tap(activations: Mapping[str, QParams]) -> Tap:
    """A tap that rounds each listed site to its grid and leaves the others alone."""

    def tap(site: str, x: Tensor) -> Tensor:
        return fake_quant_torch(x, activations[site]) if site in activations else x

    return tap


def simulate(model: Model, quantization: Quantization) -> Callable[[Tensor], Tensor]:
    """Function of pixels (B, in, h, w) to the logits the quantized model computes, (B, classes)."""
    module, tap = to_torch(on_grid(model, quantization.weights)), fake_quant_tap(quantization.activations)
    return lambda pixels: module(pixels, tap)
