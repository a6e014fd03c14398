"""Weights onto their grid: to the nearest point, or one column at a time with the error fed forward to the columns left.

A rounding maps (weight, gram, grid) to the weight on the grid, float64, (O, I). `gram` is the second moment of the inputs
the layer will meet, (I, I); what the rounding minimises is ``tr((W - Q) gram (W - Q)^T)``, the error of the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.linalg import damped_factor
from compressor.quantize.grid import per_channel, rounded
from compressor.types import QParams

__all__ = ["Rounding", "nearest", "second_order"]

Rounding = Callable[[Tensor, Tensor, QParams], Tensor]

DAMPING = 0.01  # of the mean variance, on the diagonal; keeps a rank-deficient gram invertible
COLUMNS = 128  # updated together; the columns beyond wait for one matrix product


def nearest(weight: Tensor, gram: Tensor, q: QParams) -> Tensor:
    """Each weight to its nearest grid point."""
    del gram  # Unused
    return _to_grid(weight, _scale(weight, q), q)


def second_order(weight: Tensor, gram: Tensor, q: QParams) -> Tensor:
    """Columns rounded in order of falling energy, each one's error undone as far as the columns left can.

    Never worse than `nearest` in the objective: each row takes the better of the two.

    Args:
        weight: (O, I) float64.
        gram: (I, I) float64, positive semidefinite.
        q: grid of `weight`: one scale for all, one per row, or one per group of a row's neighbours.

    Source: Frantar et al. 2022, arXiv 2210.17323 (GPTQ), Algorithm 1, with activation ordering; ERQ (arXiv 2407.06794)
    for its use after a ridge refit. Deviation: the comparison with `nearest`, row by row.
    """
    plain = nearest(weight, gram, q)
    energy = gram.diagonal()
    if not energy.mean() > 0:
        return plain
    order = energy.argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(damped_factor(gram[order][:, order], DAMPING))
    scale = _scale(weight, q).expand_as(weight)[:, order]  # groups follow the columns, not the order of rounding
    rounded = _feed_forward(weight[:, order], scale, torch.linalg.cholesky(inverse, upper=True), q)
    fed = torch.empty_like(weight)
    fed[:, order] = rounded
    better = _error(weight - fed, gram) < _error(weight - plain, gram)
    return torch.where(better[:, None], fed, plain)


def _feed_forward(weight: Tensor, scale: Tensor, factor: Tensor, q: QParams) -> Tensor:
    """`weight` rounded column by column; `factor` is the upper Cholesky factor of the inverse gram."""
    left, rounded = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            rounded[:, j] = _to_grid(left[:, j], scale[:, j], q)
            error = (left[:, j] - rounded[:, j]) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def _scale(weight: Tensor, q: QParams) -> Tensor:
    return torch.as_tensor(per_channel(q, weight.shape), dtype=torch.float64, device=weight.device)


def _to_grid(weight: Tensor, scale: Tensor, q: QParams) -> Tensor:
    steps = weight / scale
    return scale * (rounded(steps) if isinstance(q.bits, str) else torch.clamp(torch.round(steps), q.qmin, q.qmax))


def _error(difference: Tensor, gram: Tensor) -> Tensor:
    """(O,) output error of each row."""
    return ((difference @ gram) * difference).sum(1)
