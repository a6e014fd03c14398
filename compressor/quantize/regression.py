"""The refit: a layer's weights and bias, fitted to what it should output on what it really gets as input.

Weighted least squares (`compressor.least_squares`), pulled towards the weights the layer has by a ridge whose strength is
chosen on the half of the images it was not fitted to; when no strength helps there, the weights stay. Closed form, no
labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.least_squares import CrossSum, LeastSquares

__all__ = ["Fit", "Regression"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A layer refitted to its real inputs.

    `damping` is the chosen ridge strength, None where keeping the weights was best on the held-out half.
    """

    weight: Tensor  # (O, I) float64
    gram: Tensor  # (I, I) float64, centred: the intercept takes the mean
    mean_input: Tensor  # (I,)
    mean_target: Tensor  # (O,)
    damping: float | None

    def bias(self, weight: Tensor) -> Tensor:
        """(O,) the intercept that makes `weight`, rounded or not, right on average."""
        return self.mean_target - weight @ self.mean_input


class Regression:
    """Sums of two halves of the images, each (inputs, targets, weights of the rows).

    Args:
        shift: (I,) near the inputs' mean, see `CrossSum`.
        targets: O.
    """

    def __init__(self, shift: Tensor, targets: int) -> None:
        self._halves = (CrossSum(shift, targets), CrossSum(shift, targets))

    def add(self, half: int, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows x (n, I) and y (n, O), float32, with weights (n,) to half 0 or 1."""
        self._halves[half].add(x, y, weight)

    def fit(self, weight: Tensor, dampings: Sequence[float], through: Tensor | None = None) -> Fit:
        """The refit of `weight` (O, I); with `dampings` empty the weights stay and only the intercept is fitted.

        Args:
            weight: the weights to be pulled towards, float64.
            dampings: candidate strengths, as shares of the mean input variance.
            through: (O, targets) matrix mapping the targets added to the layer's targets.

        Raises:
            DataError: an input or a target was not finite.
        """
        one, two = self._halves
        damping, kept = None, torch.arange(weight.shape[1], device=weight.device)
        if dampings and not one.empty and not two.empty:
            damping = _choose(weight, _seen(one.objective(), through), _seen(two.objective(), through), dampings)
        whole = _seen(one.objective(two), through)
        fitted = weight if damping is None else whole.fit(damping, weight, kept)[0]
        return Fit(fitted, whole.sigma, whole.mean_x, whole.mean_t, damping)


def _seen(objective: LeastSquares, through: Tensor | None) -> LeastSquares:
    return objective if through is None else objective.through(through)


def _choose(weight: Tensor, fitted: LeastSquares, held: LeastSquares, dampings: Sequence[float]) -> float | None:
    """The strength whose fit to one half is best on the other; None where the weights as they are beat all."""
    kept = torch.arange(weight.shape[1], device=weight.device)
    best, choice = held.excess(weight, fitted.bias(weight, kept), kept), None
    for damping in dampings:
        candidate, _ = fitted.fit(damping, weight, kept)
        excess = held.excess(candidate, fitted.bias(candidate, kept), kept)
        if excess < best:
            best, choice = excess, damping
    return choice
