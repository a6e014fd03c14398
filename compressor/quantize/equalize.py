"""Equalisation: a channel that is much larger than the others is made smaller where it arises, and its weight columns larger.

A LayerNorm gives ``y = g * n + b``, and the linears behind it read ``W y``. With one factor s per channel, g and b divided by s
and the columns of W multiplied by s leave ``W y`` as it was, while the one grid that all channels of y share need no longer
reach as far as the largest of them. Attention mixes tokens, not channels, so the same holds between v and ``proj``. Factors
are powers of two, so nothing is rounded: the float network is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from compressor.quantize.grid import fake_quant
from compressor.quantize.plan import QuantizeConfig, weight_grid
from compressor.quantize.ranges import fit_grid
from compressor.types import PRECISION_BITS, Array, Bits, largest

__all__ = ["EXPONENTS", "SITES", "Equalized", "equalize", "expected_error", "factors", "fold"]

SITES = ("qkv", "proj", "fc1")  # by their last word: behind norm1, v and norm2
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
CLEAR = 0.8  # factors are used where they leave less than this share of the error
FARTHEST = 16  # octaves, of a factor


@dataclass(frozen=True, eq=False)
class Equalized:
    """Factors of a site's channels, and the exponent that made them; None: all are 1, since nothing was clearly better."""

    factor: Array  # (C,) float32, powers of two
    exponent: float | None


def equalize(
    rows: Array, weight: Array, site: str, config: QuantizeConfig, exponents: Sequence[float] = EXPONENTS
) -> Equalized:
    """The factors that spare the output of the linears reading a site most, where they do so clearly.

    A closed form picks the exponent on half of the rows, and there grids are fitted with and without its factors; the errors
    that they make in the output on the other half decide. What the closed form does not favour costs no fit.

    Args:
        rows: (n, C) float32, sampled inputs.
        weight: (O, C) of all linears that read them in integers, stacked.
        site: its name.
        config: bits, zero points, scale search.
        exponents: candidates; empty: nothing is equalised.

    Source: Xiao et al. 2022, arXiv 2211.10438 (SmoothQuant). Deviations: see `factors`; the exponent is chosen per site, with
    "none" among the choices.
    """
    none = Equalized(np.ones(rows.shape[1], np.float32), None)
    bits = PRECISION_BITS[config.precision]
    if config.weight_only or "e4m3" in bits or len(rows) < 2:
        return none  # an 8-bit float is as precise at any power of two
    fitted, judged = rows[::2], rows[1::2]
    expected = partial(expected_error, bits=bits)
    tried = [Equalized(factors(fitted, weight, a), a) for a in exponents]
    best = min(tried, key=lambda e: expected(fitted / e.factor, weight * e.factor), default=none)
    if not expected(fitted / best.factor, weight * best.factor) < CLEAR * expected(fitted, weight):
        return none
    plain, equal = (_error(fitted / e.factor, judged / e.factor, weight * e.factor, site, config) for e in (none, best))
    return best if equal < CLEAR * plain else none


def fold(module: nn.Module, source: str, readers: Iterable[str], factor: Array) -> None:
    """Divides what the norm or linear `source` gives by `factor` (C,), and multiplies the columns of all its `readers`."""
    by = torch.from_numpy(factor)
    weight, bias = module.get_parameter(f"{source}.weight"), module.get_parameter(f"{source}.bias")
    weight.data, bias.data = weight.data / by.reshape(-1, *[1] * (weight.ndim - 1)), bias.data / by
    for name in readers:
        columns = module.get_parameter(f"{name}.weight")
        columns.data = columns.data * by


def factors(rows: Array, weight: Array, exponent: float) -> Array:
    """(C,) powers of two near ``max|x_j|^a / max|w_j|^(1 - a)`` for channels j, over their median, and none below 1.

    >>> factors(np.array([[1, -1, 64]]), np.array([[1, -1, 1], [1, 1, 0]]), 0.5)
    array([1., 1., 8.], dtype=float32)

    Source: arXiv 2211.10438, eq. 4. Deviations: the median, which leaves most channels alone; the rounding; no channel is made
    larger: that gained nothing, and a rare value of a channel that looked small would leave the grid.
    """
    x, w = (np.abs(part).max(0).astype(np.float64) for part in (rows, weight))
    live = (x > 0) & (w > 0)
    octaves = np.zeros(len(x))
    octaves[live] = exponent * np.log2(x[live]) - (1 - exponent) * np.log2(w[live])
    octaves[live] -= np.median(octaves[live]) if live.any() else 0.0
    return np.asarray(np.exp2(np.clip(np.rint(octaves), 0, FARTHEST)), dtype=np.float32)


def expected_error(rows: Array, weight: Array, bits: Bits) -> float:
    """Squared error of the outputs of a row, if every rounding error is uniform and of its own, and nothing is clipped.

    A step d makes d^2 / 12. One input's meets a column of the weights, one weight's the mean square of its channel.
    """
    steps_w, steps_x = (np.abs(part).max(-1) / largest(n) for part, n in zip((weight, rows.ravel()), bits, strict=True))
    inputs = steps_x**2 * np.square(weight, dtype=np.float64).sum()
    weights = np.square(steps_w, dtype=np.float64).sum() * np.square(rows, dtype=np.float64).mean(0).sum()
    return float(inputs + weights) / 12


def _error(fitted: Array, judged: Array, weight: Array, site: str, config: QuantizeConfig) -> float:
    """Mean squared error that the grids of `fitted` make in the outputs of `judged`."""
    weight_bits, activation_bits = PRECISION_BITS[config.precision]
    asymmetric = config.is_asymmetric(site)
    x = fit_grid(fitted, activation_bits, weight, config.search, asymmetric=asymmetric)
    w = weight_grid(weight, weight_bits, config.search, np.square(fitted, dtype=np.float64).mean(0))
    return float(np.mean(np.square(fake_quant(judged, x) @ fake_quant(weight, w).T - judged @ weight.T)))
