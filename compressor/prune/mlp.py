"""Structured Optimal Brain Surgeon for MLP hidden units, exactly greedy, in float64.

Source: Hassibi and Stork 1993 (OBS), in the structured form of ZipLM (arXiv 2302.04089). For the quadratic
tr(W H W^T) - 2 tr(W R^T) at its minimum over the units still alive, removing unit p and re-optimising the others adds

    ||w_p||^2 / [H^-1]_pp,   after which   H^-1 -= d u u^T,  W -= w_p u^T,   u = [H^-1]_p / d,  d = [H^-1]_pp

Only norms of W's columns are needed to choose, so W is represented by G = W^T W. Removals are collected and applied to
H^-1 and G as matrix products, which is exact: rows that are needed meanwhile are corrected on the fly. With damping,
[H^-1]_pp is at least 1 / max H_pp, so the down-dates stay stable; the final weights are solved for afresh anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.least_squares import Quadratic

__all__ = ["Elimination", "eliminate"]

PENDING = 64  # removals collected before they are applied


@dataclass(frozen=True, eq=False)
class Elimination:
    """In which order units go, and what each removal adds to the quadratic."""

    order: Tensor  # (removed,) unit indices, first removed first
    added: Tensor  # (removed,) float64

    def kept(self, total: int, keep: int) -> Tensor:
        """Ascending indices of the `keep` units that stay."""
        alive = torch.ones(total, dtype=torch.bool, device=self.order.device)
        alive[self.order[: total - keep]] = False
        return alive.nonzero().flatten()


def eliminate(quadratic: Quadratic, keep: int) -> Elimination:
    """Remove units one by one, the cheapest first, until `keep` are left.

    Args:
        quadratic: positive definite hessian (M, M), cross (C, M).
        keep: how many stay.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(quadratic.hessian))
    weight = quadratic.cross @ inverse
    gram = weight.mT @ weight
    alive = torch.arange(len(inverse), device=inverse.device)
    order, added = [], []
    while len(alive) > keep:
        pending = _Pending(inverse, gram)
        for _ in range(min(PENDING, len(alive) - keep)):
            position, cost = pending.remove()
            order.append(alive[position])
            added.append(cost)
        inverse, gram, left = pending.apply()
        alive = alive[left]
    if not order:
        return Elimination(alive[:0], inverse.new_zeros(0))
    return Elimination(torch.stack(order), torch.stack(added))


class _Pending:
    """Up to `PENDING` removals from H^-1 and G, kept as rank-one terms."""

    def __init__(self, inverse: Tensor, gram: Tensor) -> None:
        self._inverse, self._gram = inverse, gram
        self._diagonal, self._norms = inverse.diagonal().clone(), gram.diagonal().clone()
        size = len(inverse)
        self._u, self._g = inverse.new_zeros(PENDING, size), inverse.new_zeros(PENDING, size)
        self._d, self._n = inverse.new_zeros(PENDING), inverse.new_zeros(PENDING)
        self._alive = torch.ones(size, dtype=torch.bool, device=inverse.device)
        self._count = 0

    def remove(self) -> tuple[Tensor, Tensor]:
        """Position and cost of the cheapest unit, which is removed."""
        cost = torch.where(self._alive, self._norms.clamp(min=0) / self._diagonal, torch.inf)
        p = cost.argmin()
        k = self._count
        u, g, d, n = self._u[:k], self._g[:k], self._d[:k], self._n[:k]
        up, gp = u[:, p], g[:, p]
        row = self._inverse[p] - (d * up) @ u
        gram_row = self._gram[p] - up @ g - (gp - n * up) @ u
        scale, norm = row[p], gram_row[p].clamp(min=0)
        row = row / scale
        self._u[k], self._g[k], self._d[k], self._n[k] = row, gram_row, scale, norm
        self._diagonal -= scale * row.square()
        self._norms -= (2 * gram_row - norm * row) * row
        self._alive[p] = False
        self._count += 1
        return p, cost[p]

    def apply(self) -> tuple[Tensor, Tensor, Tensor]:
        """H^-1 and G of the units left, and their positions."""
        left = self._alive.nonzero().flatten()
        k = self._count
        u, g = self._u[:k, left], self._g[:k, left]
        d, n = self._d[:k, None], self._n[:k, None]
        cross = u.mT @ (g - n / 2 * u)
        inverse = self._inverse[left][:, left] - u.mT @ (d * u)
        gram = self._gram[left][:, left] - cross - cross.mT
        return inverse, gram, left
