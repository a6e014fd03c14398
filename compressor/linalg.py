"""Running Gram matrices in float64, and their factors. Shared like `compressor.vit`."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import DataError

__all__ = ["GramSum", "damped_factor", "require_finite"]

PANEL = 512  # Rows of one panel: 3072 columns cost 0.58 of the full product.


def damped_factor(gram: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of ``gram + d * mean(diag(gram)) * I``, (I, I) float64.

    d is `damping`, ten times more as often as it takes: the rounding of sums can leave a rank-deficient gram slightly
    indefinite. `gram` must have a positive trace.

    Raises:
        DataError: `gram` is not finite.

    >>> damped_factor(2 * torch.eye(2, dtype=torch.float64), 1.0).diagonal().tolist()
    [2.0, 2.0]
    """
    require_finite(gram)
    level, damped = gram.diagonal().mean(), gram.clone()
    while True:
        damped.diagonal().copy_(gram.diagonal() + damping * level)
        found = torch.linalg.cholesky_ex(damped)
        if not found.info.item():
            factor: Tensor = found.L
            return factor
        damping *= 10


def require_finite(sums: Tensor) -> None:
    """Refuse sums over activations that were not finite: nothing can be fitted to them.

    Raises:
        DataError: an entry of `sums` is NaN or infinite.
    """
    if not torch.isfinite(sums).all():
        raise DataError(
            "Activations must be finite, got NaN or infinity.",
            hint="Check the images' normalisation and the checkpoint.",
        )


class GramSum:
    """Running sum of x^T x over rows x, of which only the upper triangle is computed, panel by panel.

    Each batch is multiplied in the precision of its rows (float32 on the fast path) and added in float64, so the
    rounding of the sum does not grow with the number of batches.

    Args:
        shape: (..., D); leading axes (heads) are independent.
        device: where the sum lives.

    >>> total = GramSum((2,), torch.device("cpu"))
    >>> total.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> total.matrix().tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        *heads, width = shape
        self._starts = range(0, width, PANEL)
        self._panels = [
            torch.zeros(*heads, min(PANEL, width - s), width - s, dtype=torch.float64, device=device)
            for s in self._starts
        ]

    def add(self, rows: Tensor) -> None:
        """Add rows (..., n, D)."""
        for start, panel in zip(self._starts, self._panels, strict=True):
            panel += rows[..., start : start + PANEL].transpose(-1, -2) @ rows[..., start:]

    def matrix(self) -> Tensor:
        """The whole symmetric (..., D, D) float64 sum."""
        *heads, _, width = self._panels[0].shape
        full = self._panels[0].new_zeros(*heads, width, width)
        for start, panel in zip(self._starts, self._panels, strict=True):
            full[..., start : start + PANEL, start:] = panel
            full[..., start:, start : start + PANEL] = panel.transpose(-1, -2)
        return full
