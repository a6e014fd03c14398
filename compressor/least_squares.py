"""Least squares on streamed sums, in float64: what the pruner folds with and the quantizer refits with.

A linear y = W x + b is replaced by one that reads other inputs x, or less of them, to meet targets t:

    J(W) = E ||t - mu_t - W (x - mu_x)||^2 = tr(W Sigma W^T) - 2 tr(W R^T) + E ||t - mu_t||^2,   b = mu_t - W mu_x

What is read is a subset of the inputs, given by indices (k,), or linear features of them, given by a basis (M, k).

Damping pulls W to the weights W0 there were: J(W) + lambda ||W - W0||^2, lambda = damping * mean variance (scale free).
So for any damping the solution is at least as good, on the same images, as W0 with columns deleted and nothing else
done: that is one of the candidates the minimum is taken over. The same quadratic is what Optimal Brain Surgeon
eliminates columns from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.linalg import GramSum, require_finite

__all__ = ["CrossSum", "LeastSquares", "Quadratic"]

NOISE = 1e-6  # of float32 products, as a share of the second moments they are taken from
TINY = 1e-300  # keeps 0 / 0 at 0


def _read(rows: Tensor, kept: Tensor) -> Tensor:
    """What `kept` reads of rows (n, M): columns by index (k,), or products with a basis (M, k)."""
    return rows[:, kept] if kept.ndim == 1 else rows @ kept


def _both(symmetric: Tensor, kept: Tensor) -> Tensor:
    """(M, M) -> (k, k)."""
    return _read(_read(symmetric, kept).mT, kept)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """tr(W hessian W^T) - 2 tr(W cross^T), positive definite, minimised over weights that read `kept`."""

    hessian: Tensor  # (M, M)
    cross: Tensor  # (C, M)

    def solve(self, kept: Tensor) -> Tensor | None:
        """The minimising weights (C, kept); None when the sums are too noisy for so little damping."""
        factor, info = torch.linalg.cholesky_ex(_both(self.hessian, kept))
        return torch.cholesky_solve(_read(self.cross, kept).mT, factor).mT if info.item() == 0 else None


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """J of the module docstring for inputs x (M) and targets t (C); float64."""

    sigma: Tensor  # (M, M) covariance of x
    cross: Tensor  # (C, M) covariance of t with x
    mean_x: Tensor  # (M,)
    mean_t: Tensor  # (C,)
    energy: float  # E ||t - mu_t||^2
    noise: float  # least ridge that keeps sigma positive definite

    def through(self, matrix: Tensor) -> LeastSquares:
        """That of targets ``matrix @ t``, whose energy these sums do not tell: it is NaN."""
        return replace(self, cross=matrix @ self.cross, mean_t=matrix @ self.mean_t, energy=float("nan"))

    def damped(self, damping: float, anchor: Tensor) -> Quadratic:
        """The quadratic J(W) + lambda ||W - anchor||^2 of full-width W (C, M)."""
        ridge = max(damping * self.sigma.diagonal().mean().item(), self.noise)
        ridge = ridge if ridge > 0 else 1.0  # inputs that never vary: keep the anchor
        eye = torch.eye(len(self.sigma), dtype=self.sigma.dtype, device=self.sigma.device)
        return Quadratic(self.sigma + ridge * eye, self.cross + ridge * anchor)

    def fit(self, damping: float, anchor: Tensor, kept: Tensor) -> tuple[Tensor, float]:
        """The W (C, kept) that `damped` asks for, and the damping that it took: ten times more as often as is needed."""
        weight = self.damped(damping, anchor).solve(kept)
        while weight is None:
            damping *= 10
            weight = self.damped(damping, anchor).solve(kept)
        return weight, damping

    def bias(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The b that goes with `weight` (C, kept)."""
        return self.mean_t - _read(self.mean_x[None], kept)[0] @ weight.mT

    def excess(self, weight: Tensor, bias: Tensor, kept: Tensor) -> float:
        """E ||t - W x - b||^2 less the energy of the targets, for W (C, kept)."""
        sigma, cross = _both(self.sigma, kept), _read(self.cross, kept)
        offset = (self.bias(weight, kept) - bias).square().sum().item()
        return ((weight @ sigma - 2 * cross) * weight).sum().item() + offset

    def error(self, weight: Tensor, bias: Tensor, kept: Tensor) -> float:
        """E ||t - W x - b||^2 over the targets' energy, for W (C, kept)."""
        return max(self.energy + self.excess(weight, bias, kept), 0.0) / max(self.energy, TINY)


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
        self._weight += weight.sum(dtype=torch.float64).item()
        self._x += (weight[:, None] * x).sum(0, dtype=torch.float64)
        self._t += (weight[:, None] * t).sum(0, dtype=torch.float64)
        x, t = root * x, root * t
        self._energy += t.square().sum(dtype=torch.float64).item()
        self._cross += t.mT @ x
        self._gram.add(x)

    def objective(self, other: CrossSum | None = None) -> LeastSquares:
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
        return LeastSquares(sigma, cross, self._shift + mean_x, mean_t, max(energy, 0.0), noise)
