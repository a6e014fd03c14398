"""Scale search: minimise the rounding error over one number per tensor or per channel.

An objective maps scales, shape (R,), to errors, shape (R,); every row is searched at once and one call counts as one
evaluation. Two objectives: the squared error of weight rows weighted by the energy of the input each weight meets, and the
expected squared rounding error under a log histogram of activations. Three searches share one signature: `golden`, `ternary`
(as published) and `exhaustive` (the reference both are measured against by `bench/search.py`). ``compress`` runs `golden` on
weight rows, and on sampled inputs in `compressor.quantize.ranges`; the rest is kept to measure it against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compressor.errors import ConfigError
from compressor.types import BINS, LOW, PER_OCTAVE, Array, Histogram

__all__ = ["Found", "Objective", "Search", "exhaustive", "golden", "histogram_error", "row_error", "ternary"]

Objective = Callable[[Array], Array]

# Fractions of the min-max scale; the search adds 1.0, min-max itself. Denser near 1, where 6 and 8 bits ripple.
COARSE = np.array([1.1, 0.965, 0.93, 0.86, 0.8, 0.74, 0.68, 0.6, 0.5, 0.4, 0.28, 0.15])
TAIL = np.array([0.1, 0.06, 0.03, 0.01, 0.003])  # visited only when 0.15 won somewhere: one outlier in a million
GOLDEN_STEPS = 7
INVERSE_PHI = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Found:
    """The best scale visited, per row, its error, and how many times the objective was evaluated."""

    scale: Array  # (R,) float64
    error: Array  # (R,) float64
    evaluations: int


Search = Callable[[Objective, Array], Found]


def golden(objective: Objective, minmax: Array) -> Found:
    """The safe search: a coarse logarithmic grid, then golden section inside the best bracket; the best visit wins.

    Never worse than min-max, which is on the grid, and never misled by the ripples that rounding puts on the curve:
    they only cost the last fraction of a per cent.

    Args:
        objective: errors (R,) for scales (R,).
        minmax: (R,) scales at which nothing is clipped.

    Source: Kiefer 1953 (golden section) on log(scale); in place of the ternary search of arXiv 2602.01741, whose
    unimodality does not hold.
    """
    track = _Track(objective, np.asarray(minmax, dtype=np.float64))
    for f in (1.0, *COARSE):  # min-max first: it wins every tie, as where the inputs never vary and all errors are 0
        track.visit(np.full_like(track.base, f))
    factors = np.sort(np.append(COARSE, 1.0))
    if (track.best == factors[0]).any():
        for f in TAIL:
            track.visit(np.full_like(track.base, f))
        factors = np.sort(np.concatenate([factors, TAIL]))
    k = np.searchsorted(factors, track.best)
    low = np.log(factors[np.maximum(k - 1, 0)])
    high = np.log(factors[np.minimum(k + 1, len(factors) - 1)])
    left, right = high - INVERSE_PHI * (high - low), low + INVERSE_PHI * (high - low)
    at_left, at_right = track.visit(np.exp(left)), track.visit(np.exp(right))
    for _ in range(GOLDEN_STEPS - 2):
        go_left = at_left < at_right
        low, high = np.where(go_left, low, left), np.where(go_left, right, high)
        new = np.where(go_left, high - INVERSE_PHI * (high - low), low + INVERSE_PHI * (high - low))
        value = track.visit(np.exp(new))
        left, right = np.where(go_left, new, right), np.where(go_left, left, new)
        at_left, at_right = np.where(go_left, value, at_right), np.where(go_left, at_left, value)
    return track.found()


def ternary(objective: Objective, minmax: Array) -> Found:
    """The published search, as coded for activations: each outer third of the bracket is scored by two interior points.

    Source: TAPTQ, arXiv 2602.01741; candidates ``s * D0``, 101 uniform values of s in [0.01, 2]. The bracket of each
    row moves on its own here; the release shares one bracket between rows.
    """
    base = np.asarray(minmax, dtype=np.float64)
    track, grid = _Track(objective, base), np.linspace(0.01, 2.0, 101)
    left, right = np.zeros(base.shape, dtype=int), np.full(base.shape, 100)

    def third(a: Array, b: Array) -> Array:
        return (track.visit(grid[(2 * a + b) // 3]) + track.visit(grid[(a + 2 * b) // 3])) / 2

    while (right - left > 2).any():
        m1, m2 = (2 * left + right) // 3, (left + 2 * right) // 3
        worse, active = third(left, m1) > third(m2, right), right - left > 2
        left, right = np.where(active & worse, m1, left), np.where(active & ~worse, m2, right)
    scale = base * grid[(left + right) // 2]
    return Found(scale, objective(scale), track.evaluations + 1)


def exhaustive(objective: Objective, minmax: Array, points: int = 101) -> Found:
    """The reference: `points` factors, uniform in [0.01, 1.2], and min-max itself."""
    track = _Track(objective, np.asarray(minmax, dtype=np.float64))
    for f in (*np.linspace(0.01, 1.2, points), 1.0):
        track.visit(np.full_like(track.base, f))
    return track.found()


class _Track:
    """Counts evaluations and remembers the best factor of each row."""

    def __init__(self, objective: Objective, base: Array) -> None:
        self.objective, self.base, self.evaluations = objective, base, 0
        self.best, self.error = np.ones_like(base), np.full(base.shape, np.inf)

    def visit(self, factor: Array) -> Array:
        error = np.asarray(self.objective(self.base * factor), dtype=np.float64)
        self.evaluations += 1
        better = error < self.error
        self.best, self.error = np.where(better, factor, self.best), np.where(better, error, self.error)
        return error

    def found(self) -> Found:
        return Found(self.base * self.best, self.error, self.evaluations)


# --------------------------------------------------------------------------- objectives


def histogram_error(histogram: Histogram, bits: int, low: float | None = None) -> Objective:
    """Objective: mean squared rounding error of one tensor whose magnitudes follow `histogram`.

    The density is uniform inside each bin, so the integral is exact: over u = x / scale in [0, u] it is
    ``scale^3 (n / 12 + (u - n)^3 / 3)`` with n = min(round(u), steps), for rounding and clipping alike.

    Args:
        histogram: of |x|.
        bits: of the grid.
        low: None for the symmetric grid; otherwise the grid reaches down to `low`, which must cover every negative value,
            and its remaining integers go to the positive side.

    Returns:
        Function of scales (R,) to mean squared errors (R,).
    """
    filled = np.flatnonzero(histogram.counts)
    if len(filled) == 0:
        raise ConfigError("quantize: an activation histogram must not be empty.")
    edges = 2.0 ** (LOW + np.arange(BINS + 1) / PER_OCTAVE)
    edges[0], edges[-1] = 0.0, max(edges[-1], histogram.amax)
    below = edges[filled]
    above = np.maximum(np.minimum(edges[filled + 1], histogram.amax), below * (1 + 1e-9) + 1e-300)
    density = histogram.counts[filled] / histogram.counts.sum() / (above - below)

    def integral(u: Array, steps: Array) -> Array:
        n = np.minimum(np.rint(u), steps)
        return n / 12 + (u - n) ** 3 / 3

    def error(scale: Array) -> Array:
        s = np.asarray(scale, dtype=np.float64)[:, None]
        steps = (
            np.maximum(2**bits - 1 - np.rint(-low / s), 0) if low is not None else np.full_like(s, 2 ** (bits - 1) - 1)
        )
        return np.asarray(((integral(above / s, steps) - integral(below / s, steps)) * s**3) @ density)

    return error


def row_error(rows: Array, bits: int, energy: Array | None = None) -> Objective:
    """Objective: rounding error of each weight row, sum over inputs of ``energy * (w - Q(w))^2``.

    Args:
        rows: (R, I) weights.
        bits: of the symmetric grid.
        energy: (I,) mean square of the input each column meets; None weighs all alike.

    Returns:
        Function of scales (R,) to errors (R,).
    """
    rows = np.asarray(rows, dtype=np.float32)
    weight = np.ones(rows.shape[1]) if energy is None else np.asarray(energy, dtype=np.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(scale: Array) -> Array:
        s = np.asarray(scale, dtype=np.float32)[:, None]
        return ((rows - np.clip(np.rint(rows / s), low, high) * s) ** 2) @ weight

    return error
