"""Values and output projection: whole heads that the others can replace, and fewer value dimensions per head.

The output projection reads o, the heads' outputs side by side; its quadratic (see `regress`) has hessian H and
minimum W*.

Heads: removing head h and re-optimising the others adds tr(W_h ([H^-1]_hh)^-1 W_h^T), block-wise Optimal Brain Surgeon.
Dimensions: with H_hh = L L^T, head h keeps the r unit-variance directions T of L^-1 o_h that W*_h writes with most
energy, W*_h L = R diag(s) T^T. The features T_r^T L^-1 o_h are folded into the value projection (each row of
attention sums to one, so a fold commutes with it), and the output projection is fitted again over all heads'
features. Their scales are free, since that fit undoes them: see `evened`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.least_squares import Quadratic
from compressor.prune.qk import tail_errors

__all__ = ["block_diagonal", "evened", "reduce_values", "remove_heads"]

TINY = 1e-9  # of the largest feature: those below read nothing


def remove_heads(quadratic: Quadratic, heads: int, keep: int) -> list[int]:
    """Ascending indices of the `keep` heads that stay when the cheapest go one by one."""
    width = len(quadratic.hessian) // heads
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(quadratic.hessian))
    weight, alive = quadratic.cross @ inverse, list(range(heads))
    while len(alive) > keep:
        cost = {}
        for head in alive:
            own = slice(head * width, (head + 1) * width)
            cost[head] = (torch.linalg.solve(inverse[own, own], weight[:, own].mT) * weight[:, own].mT).sum().item()
        gone = min(alive, key=lambda h: cost[h])
        own = slice(gone * width, (gone + 1) * width)
        step = torch.linalg.solve(inverse[own, own], inverse[own])
        weight, inverse = weight - weight[:, own] @ step, inverse - inverse[:, own] @ step
        alive.remove(gone)
    return alive


def reduce_values(quadratic: Quadratic, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """Bases (H, Dv, rank) of the features each head keeps, of unit variance, and the relative error of every rank."""
    width = len(quadratic.hessian) // heads
    weight = torch.cholesky_solve(quadratic.cross.mT, torch.linalg.cholesky(quadratic.hessian))  # (H * Dv, C)
    own = torch.stack([quadratic.hessian[i : i + width, i : i + width] for i in range(0, heads * width, width)])
    factor = torch.linalg.cholesky(own)
    seen = factor.mT @ weight.reshape(heads, width, -1)  # (H, Dv, C): what each unit-variance direction writes
    energy, directions = torch.linalg.eigh(seen @ seen.mT)
    basis = torch.linalg.solve_triangular(factor.mT, directions.flip(-1), upper=True)
    return basis[..., :rank], tail_errors(energy.flip(-1))


def evened(basis: Tensor, weight: Tensor) -> Tensor:
    """`basis` with its features scaled so that all are as large on a token as the values were that they are made of.

    Attention averages over tokens, so what has unit variance behind it may be huge or small before it (embedded model, half of
    everything: 0.4 to 35 in one layer), and an integer grid that all values share then rounds the small ones to nothing. With
    equal sizes the error that such a grid makes is the least: a larger feature is written by a smaller column of the projection.

    Args:
        basis: (H, Dv, r).
        weight: (H * Dv, C) of the values, with the norm's scale inside: tokens count as white.
    """
    rows = weight.reshape(*basis.shape[:2], -1)
    sizes = (basis.mT @ rows).norm(dim=2)  # (H, r)
    wanted = rows.square().sum(2).mean().sqrt()
    return basis * torch.where(sizes > TINY * sizes.max(), wanted / sizes, 1.0)[:, None]


def block_diagonal(basis: Tensor) -> Tensor:
    """(H, D, r) -> (H * D, H * r): every head's basis on its own inputs."""
    diagonal: Tensor = torch.block_diag(*basis)  # type: ignore[no-untyped-call]
    return diagonal
