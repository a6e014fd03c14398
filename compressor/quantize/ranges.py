"""The grid of an activation site, chosen on sampled inputs by the error it makes in the output of the layers that read it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compressor.quantize.grid import affine, fake_quant, symmetric
from compressor.quantize.search import Search
from compressor.types import Array, QParams, Width

__all__ = ["fit_grid", "sample_rows"]

MULTIPLIES = 2**28  # of one evaluation, which bounds how many rows are looked at
FEWEST, MOST = 128, 2048


def sample_rows(rows: Array, weight: Array, outputs: int) -> Array:
    """Rows (n, I) drawn in proportion to `weight`, by even steps through its running sum, so that nothing is random.

    Args:
        rows: (N, I) float32.
        weight: (N,) importance of each row.
        outputs: width of the layers that read them; wide layers are judged on fewer rows.
    """
    count = int(np.clip(MULTIPLIES // (rows.shape[1] * outputs), FEWEST, MOST))
    if len(rows) <= count and np.ptp(weight) == 0:
        return rows
    running = np.cumsum(weight, dtype=np.float64)
    picks = np.searchsorted(running, (np.arange(count) + 0.5) / count * running[-1])
    return np.asarray(rows[np.minimum(picks, len(rows) - 1)])


def fit_grid(rows: Array, bits: Width, weight: Array, search: Search, *, asymmetric: bool) -> QParams:
    """The per-tensor grid with the least error E |W (x - Q(x))|^2 over sampled inputs.

    With `asymmetric` the two ends of the range are searched in turn, and the result is kept only where it beats the
    symmetric grid: a zero point is free in the integer kernels that take one, but it is not always better.

    Args:
        rows: (n, I) float32 inputs of the layers.
        bits: of the grid.
        weight: (O, I) of all layers that read the site, stacked.
        search: of one scale.
        asymmetric: whether the target runs a zero point at full speed.
    """
    low, high = float(min(rows.min(), 0)), float(max(rows.max(), 0))
    across = np.ascontiguousarray(weight.T, dtype=np.float32)

    def error(q: QParams) -> float:
        return float(np.mean(np.square((fake_quant(rows, q) - rows) @ across), dtype=np.float64))

    def best(make: Callable[[float], QParams], start: float) -> float:
        return float(search(lambda s: np.array([error(make(float(v))) for v in s]), np.array([start])).scale[0])

    if not high > low:
        return symmetric(0.0, bits)
    even = symmetric(best(lambda v: symmetric(v, bits), max(high, -low)), bits)
    if not asymmetric or isinstance(bits, str):
        return even
    top = best(lambda v: affine(low, v, bits), high) if high > 0 else 0.0
    bottom = -best(lambda v: affine(-v, top, bits), -low) if low < 0 else 0.0
    skewed = affine(bottom, top, bits)
    return skewed if error(skewed) < error(even) else even
