"""Accumulators of the streamed pass: each takes batches of one site's activations and leaves a mergeable record.

Sums are float64; a batch is multiplied in float32 and added in float64, so nothing is lost by adding many batches. What
is left behind depends on the set of vectors only, so two passes merge into the pass over both up to float64 rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.linalg import GramSum
from compressor.types import BINS, LOW, PER_OCTAVE, Histogram, Moments

__all__ = ["HistogramSum", "MomentSum", "PairEnergySum"]

CODES = 1 << 15  # Sign-free upper halves of float32: 8 exponent and 7 mantissa bits.


class MomentSum:
    """Count, sum and outer-product sum of rows (..., n, D) with heads as leading axes."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._count = 0
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._gram = GramSum(shape, device)

    def add(self, rows: Tensor) -> None:
        """Take one batch of rows (..., n, D)."""
        self._count += rows.shape[-2]
        self._sum += rows.sum(-2)  # float32 within a batch, like its products
        self._gram.add(rows)

    def result(self, site: str) -> Moments:
        """The moments of everything added.

        Raises:
            DataError: a value of `site` was NaN or infinite.
        """
        moments = Moments(self._count, self._sum, self._gram.matrix())
        if not torch.isfinite(moments.outer).all():
            raise _not_finite(site)
        return moments


class HistogramSum:
    """Histogram of |x| on the logarithmic bins of `types.Histogram`.

    Values are counted by the upper 16 bits of their float32 pattern (an integer shift and one bincount per batch) and
    those counts are folded into the bins at the end. Deviation: a code is put whole into the bin of its lower edge,
    so a bin's edge is met within 2^-7 of its value, where a bin is 2^(1/16) = 4.4 % wide.
    """

    def __init__(self, device: torch.device) -> None:
        self._codes = torch.zeros(CODES, dtype=torch.int64, device=device)
        self._low, self._high = 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """Take one batch of float32 values of any shape."""
        flat = values.float().reshape(-1)
        codes = (flat.view(torch.int32) >> 16) & (CODES - 1)
        self._codes += torch.bincount(codes, minlength=CODES)
        low, high = flat.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def result(self, site: str) -> Histogram:
        """The histogram of everything added.

        Raises:
            DataError: a value of `site` was NaN or infinite.
        """
        codes = self._codes.cpu().numpy()
        edges = (np.arange(CODES, dtype=np.uint32) << 16).view(np.float32)  # lower edge of each code
        finite = np.isfinite(edges)
        if codes[~finite].any():
            raise _not_finite(site)
        bins = np.floor((np.log2(np.maximum(edges[finite], 2.0**LOW)) - LOW) * PER_OCTAVE).astype(np.int64)
        counts = np.bincount(np.minimum(bins, BINS - 1), weights=codes[finite], minlength=BINS).astype(np.int64)
        return Histogram(counts, max(self._high, -self._low), self._low)


class PairEnergySum:
    """Sum over tokens of q_j^2 k_j^2, (H, D) float64: CORP's score of a query/key dimension."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, q: Tensor, k: Tensor) -> None:
        """Take q and k (H, n, D) of the same tokens."""
        self.total += (q * k).square().sum(-2, dtype=torch.float64)


def _not_finite(site: str) -> DataError:
    return DataError(
        f"Activations at site {site!r} must be finite, got NaN or infinity.",
        hint="Check the images' normalisation and the checkpoint.",
    )
