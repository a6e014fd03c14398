"""Least squares on streamed sums: the one objective behind every fold of `obs`, and its damped solution.

A linear y = W x + b of the dense network is replaced by one that reads less of x, to meet targets t:

    J(W) = E ||t - mu_t - W (x - mu_x)||^2 = tr(W Sigma W^T) - 2 tr(W R^T) + E ||t - mu_t||^2,   b = mu_t - W mu_x

What is read is a subset of the inputs, given by indices (k,), or linear features of them, given by a basis (M, k).

Damping pulls W to the dense weights W0: J(W) + lambda ||W - W0||^2, lambda = damping * mean variance (scale free). So
for any damping the solution is at least as good, on the same images, as W0 with columns deleted and nothing else
done: that is one of the candidates the minimum is taken over. The same quadratic is what Optimal Brain Surgeon
eliminates columns from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.linalg import GramSum, require_finite

__all__ = ["DAMPINGS", "CrossSum", "Fold", "Objective", "Quadratic", "fold", "read"]

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # the grid of automatic damping
DEFAULT = 1e-3  # where there is nothing to choose by
NOISE = 1e-6  # of float32 products, as a share of the second moments they are taken from
TINY = 1e-300  # keeps 0 / 0 at 0


def read(rows: Tensor, kept: Tensor) -> Tensor:
    """What `kept` reads of rows (n, M): columns by index (k,), or products with a basis (M, k)."""
    return rows[:, kept] if kept.ndim == 1 else rows @ kept


def _both(symmetric: Tensor, kept: Tensor) -> Tensor:
    """(M, M) -> (k, k)."""
    return read(read(symmetric, kept).mT, kept)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """tr(W hessian W^T) - 2 tr(W cross^T), positive definite, minimised over weights that read `kept`."""

    hessian: Tensor  # (M, M)
    cross: Tensor  # (C, M)

    def solve(self, kept: Tensor) -> Tensor | None:
        """The minimising weights (C, kept); None when the sums are too noisy for so little damping."""
        factor, info = torch.linalg.cholesky_ex(_both(self.hessian, kept))
        return torch.cholesky_solve(read(self.cross, kept).mT, factor).mT if info.item() == 0 else None


@dataclass(frozen=True, eq=False)
class Objective:
    """J of the module docstring for all inputs x (M) and targets t (C); float64."""

    sigma: Tensor  # (M, M) covariance of x
    cross: Tensor  # (C, M) covariance of t with x
    mean_x: Tensor  # (M,)
    mean_t: Tensor  # (C,)
    energy: float  # E ||t - mu_t||^2
    noise: float  # least ridge that keeps sigma positive definite

    def damped(self, damping: float, anchor: Tensor) -> Quadratic:
        """The quadratic J(W) + lambda ||W - anchor||^2 of full-width W (C, M)."""
        ridge = max(damping * self.sigma.diagonal().mean().item(), self.noise)
        ridge = ridge if ridge > 0 else 1.0  # inputs that never vary: keep the dense weights
        eye = torch.eye(len(self.sigma), dtype=self.sigma.dtype, device=self.sigma.device)
        return Quadratic(self.sigma + ridge * eye, self.cross + ridge * anchor)

    def bias(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The b that goes with `weight` (C, kept)."""
        return self.mean_t - read(self.mean_x[None], kept)[0] @ weight.mT

    def error(self, weight: Tensor, bias: Tensor, kept: Tensor) -> float:
        """E ||t - W x - b||^2 over the targets' variance, for W (C, kept)."""
        sigma, cross = _both(self.sigma, kept), read(self.cross, kept)
        centred = self.energy + ((weight @ sigma - 2 * cross) * weight).sum().item()
        offset = (self.bias(weight, kept) - bias).square().sum().item()
        return max(centred + offset, 0.0) / max(self.energy, TINY)


class CrossSum:
    """Running sums of weighted rows x (n, M) and targets t (n, C); ``a.objective(b)`` is that of both.

    Args:
        shift: (M,) taken off every x first, near its mean, so that little is lost when means are large.
        outputs: C.
    """

    def __init__(self, shift: Tensor, outputs: int) -> None:
        inputs, device = len(shift), shift.device
        self._shift, self._weight, self._energy = shift, 0.0, 0.0
        self._x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._t = torch.zeros(outputs, dtype=torch.float64, device=device)
        self._cross = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self._gram = GramSum((inputs,), device)

    @property
    def empty(self) -> bool:
        """Whether no row was added."""
        return self._weight == 0

    def add(self, x: Tensor, t: Tensor, weight: Tensor) -> None:
        """Add rows x (n, M), t (n, C) of positive weights (n,), float32 or float64."""
        root, x = weight.sqrt()[:, None], x - self._shift
        self._weight += weight.sum().item()
        self._x += weight @ x
        self._t += weight @ t
        x, t = root * x, root * t
        self._energy += t.square().sum(dtype=torch.float64).item()
        self._cross += t.mT @ x
        self._gram.add(x)

    def objective(self, other: CrossSum | None = None) -> Objective:
        """The objective over everything added here, and to `other` of the same shift.

        Raises:
            DataError: an input or a target was not finite.
        """
        weight, x, t = self._weight, self._x, self._t
        gram, cross, energy = self._gram.matrix(), self._cross, self._energy
        if other is not None:
            weight, x, t = weight + other._weight, x + other._x, t + other._t
            gram, cross, energy = gram + other._gram.matrix(), cross + other._cross, energy + other._energy
        require_finite(gram)
        require_finite(cross)
        mean_x, mean_t = x / weight, t / weight
        sigma, cross = gram / weight - torch.outer(mean_x, mean_x), cross / weight - torch.outer(mean_t, mean_x)
        energy = energy / weight - mean_t.square().sum().item()
        noise = NOISE * (gram.diagonal().mean() / weight + mean_x.square().sum()).item()  # of products, of the mean
        return Objective(sigma, cross, self._shift + mean_x, mean_t, max(energy, 0.0), noise)


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
    weight = whole.damped(damping, anchor).solve(kept)
    while weight is None:
        damping *= 10
        fallback = f"damping raised to {damping:g}: the sums were too noisy for less"
        weight = whole.damped(damping, anchor).solve(kept)
    bias = whole.bias(weight, kept)
    return Fold(weight, bias, whole.error(weight, bias, kept), damping, fallback)


def _choose(fit: Objective, held: Objective, anchor: Tensor, kept: Tensor) -> float:
    """The damping whose fit on `fit` has the least error on `held`."""
    errors = {}
    for damping in DAMPINGS:
        weight = fit.damped(damping, anchor).solve(kept)
        if weight is not None:
            errors[damping] = held.error(weight, fit.bias(weight, kept), kept)
    return min(errors, key=lambda d: errors[d], default=DAMPINGS[-1])
