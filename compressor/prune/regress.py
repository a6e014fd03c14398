"""The fold: a linear of the dense network, refitted to read only what stays (`compressor.least_squares`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compressor.least_squares import CrossSum, LeastSquares

__all__ = ["DAMPINGS", "DEFAULT", "Fold", "fold"]

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # the grid of automatic damping
DEFAULT = 1e-3  # where there is nothing to choose by


@dataclass(frozen=True, eq=False)
class Fold:
    """A fitted linear: weights (C, kept), bias (C,), its relative error on the images fitted, and how it was damped."""

    weight: Tensor
    bias: Tensor
    error: float
    damping: float
    fallback: str = ""


def fold(fit: CrossSum, held: CrossSum, anchor: Tensor, kept: Tensor, damping: float | None) -> Fold:
    """The linear that reads only `kept`, fitted on all sums.

    Args:
        fit: sums of the images fitted.
        held: sums of other images; only with `damping` None do they count as held out, and only while choosing it.
        anchor: dense weights (C, M) that damping pulls to.
        kept: what is read: indices (k,) or a basis (M, k).
        damping: share of the mean variance; None chooses from `DAMPINGS` by the error on `held`.
    """
    fallback = ""
    whole = fit.objective(held)
    if damping is None and held.empty:
        damping, fallback = DEFAULT, f"damping {DEFAULT}: too few images to hold some out"
    elif damping is None:
        damping = _choose(fit.objective(), held.objective(), anchor, kept)
    weight, taken = whole.fit(damping, anchor, kept)
    if taken > damping:
        fallback = f"damping raised to {taken:g}: the sums were too noisy for less"
    bias = whole.bias(weight, kept)
    return Fold(weight, bias, whole.error(weight, bias, kept), taken, fallback)


def _choose(fit: LeastSquares, held: LeastSquares, anchor: Tensor, kept: Tensor) -> float:
    """The damping whose fit on `fit` has the least error on `held`."""
    errors = {}
    for damping in DAMPINGS:
        weight = fit.damped(damping, anchor).solve(kept)
        if weight is not None:
            errors[damping] = held.error(weight, fit.bias(weight, kept), kept)
    return min(errors, key=lambda d: errors[d], default=DAMPINGS[-1])
