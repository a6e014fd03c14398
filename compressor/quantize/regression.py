"""Weighted least squares of what a layer should output on what it really gets as input, streamed and in float64.

The fit is pulled towards the weights the layer has, by a ridge whose strength is chosen on the half of the images it was
not fitted to; when no strength helps there, the weights stay. Closed form, no labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.linalg import GramSum, damped_factor

__all__ = ["Fit", "Regression"]


class _Sums:
    """Weighted moments of inputs x (I,) and targets y (O,): n, E x, E y, E x x^T, E y x^T.

    Inputs are taken relative to the mean of the first rows: where the mean is large, the sums would lose the variance.
    """

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self.count = 0.0
        self.origin: Tensor | None = None  # (I,) float32
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.y = torch.zeros(targets, dtype=torch.float64, device=device)
        self.cross = torch.zeros(targets, inputs, dtype=torch.float64, device=device)
        self.gram = GramSum((inputs,), device)

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        if self.origin is None:
            self.origin = x.mean(0)
        x = x - self.origin
        weighted = x * weight[:, None]
        self.count += float(weight.double().sum())
        self.x += weighted.sum(0, dtype=torch.float64)
        self.y += (y * weight[:, None]).sum(0, dtype=torch.float64)
        self.cross += y.T @ weighted
        self.gram.add(x * weight.sqrt()[:, None])

    def centred(self) -> _Centred:
        assert self.origin is not None
        x, y = self.x / self.count, self.y / self.count
        return _Centred(
            self.count,
            x + self.origin,
            y,
            self.gram.matrix() / self.count - torch.outer(x, x),
            self.cross / self.count - torch.outer(y, x),
        )


@dataclass(frozen=True, eq=False)
class _Centred:
    count: float
    x: Tensor  # (I,) mean input
    y: Tensor  # (O,) mean target
    gram: Tensor  # (I, I) covariance of the input
    cross: Tensor  # (O, I) covariance of target and input

    def through(self, matrix: Tensor) -> _Centred:
        """The moments of targets ``matrix @ y``."""
        return _Centred(self.count, self.x, matrix @ self.y, self.gram, matrix @ self.cross)

    def __add__(self, other: _Centred) -> _Centred:
        n = self.count + other.count
        a, b = self.count / n, other.count / n
        dx, dy = self.x - other.x, self.y - other.y
        return _Centred(
            n,
            a * self.x + b * other.x,
            a * self.y + b * other.y,
            a * self.gram + b * other.gram + a * b * torch.outer(dx, dx),
            a * self.cross + b * other.cross + a * b * torch.outer(dy, dx),
        )

    def ridge(self, weight: Tensor, damping: float) -> Tensor:
        """argmin over W of E |y - W x|^2 + damping * mean(diag gram) * |W - weight|^2, intercept free."""
        factor = damped_factor(self.gram, damping)
        return weight + torch.cholesky_solve((self.cross - weight @ self.gram).T, factor).T

    def loss(self, weight: Tensor) -> float:
        """E |y - W x|^2 with the best intercept, up to a constant."""
        return float(((weight @ self.gram - 2 * self.cross) * weight).sum())


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
        inputs: I.
        targets: O.
        device: where the sums live.
    """

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self._halves = (_Sums(inputs, targets, device), _Sums(inputs, targets, device))

    def add(self, half: int, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows x (n, I) and y (n, O), float32, with weights (n,) to half 0 or 1."""
        self._halves[half].add(x, y, weight)

    def fit(self, weight: Tensor, dampings: Sequence[float], through: Tensor | None = None) -> Fit:
        """The refit of `weight` (O, I); with `dampings` empty the weights stay and only the intercept is fitted.

        Args:
            weight: the weights to be pulled towards, float64.
            dampings: candidate strengths, as shares of the mean input variance.
            through: (O, targets) matrix mapping the targets added to the layer's targets.
        """
        halves = [sums.centred() for sums in self._halves if sums.count]
        if through is not None:
            halves = [half.through(through) for half in halves]
        total = halves[0] + halves[1] if len(halves) == 2 else halves[0]
        damping = _choose(weight, halves[0], halves[1], dampings) if len(halves) == 2 else None
        fitted = weight if damping is None else total.ridge(weight, damping)
        return Fit(fitted, total.gram, total.x, total.y, damping)


def _choose(weight: Tensor, fitted: _Centred, held_out: _Centred, dampings: Sequence[float]) -> float | None:
    """The strength whose fit to one half is best on the other; None where the weights as they are beat all."""
    if not fitted.gram.diagonal().mean() > 0:
        return None
    best, choice = held_out.loss(weight), None
    for damping in dampings:
        loss = held_out.loss(fitted.ridge(weight, damping))
        if loss < best:
            best, choice = loss, damping
    return choice
