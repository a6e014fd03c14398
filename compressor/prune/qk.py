"""Queries and keys of fewer dimensions: the best rank-r logits per head, whatever basis they take.

Logits q_i^T k_j may lose anything that is constant over j, for softmax does not see it. So keys count by their
covariance over the tokens of their image, Kc, and queries by their second moment A (bias included). With independent
i and j the mean squared change of q_i^T P k_j is ||A^1/2 (I - P) Kc^1/2||^2, least over all P of rank r for

    A^1/2 Kc^1/2 = R diag(s) Z^T,   q' = (A^-1/2 R_r diag(s_r)^1/2)^T q,   k' = (Kc^-1/2 Z_r diag(s_r)^1/2)^T k

and is then sum_{j>r} s_j^2. The key bias is a constant over j and is dropped. Any r x C map can be a query
projection, so nothing is lost by leaving the coordinate axes; models that normalise q and k are the exception, see
`qk_norm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.linalg import require_finite

__all__ = ["LogitMoments", "LogitReduction", "reduce_logits", "tail_errors"]

FLOOR = 1e-6  # least eigenvalue, as a share of the mean: directions that calibration never saw stay finite


class LogitMoments:
    """Running A and Kc of one block, (H, D, D) float64."""

    def __init__(self, heads: int, width: int, device: torch.device) -> None:
        self.queries = torch.zeros(heads, width, width, dtype=torch.float64, device=device)
        self.keys = torch.zeros(heads, width, width, dtype=torch.float64, device=device)

    def add(self, q: Tensor, k: Tensor, weight: Tensor) -> None:
        """Add q, k (B, H, T, D); `weight` (T,) says how much each token's own output matters."""
        k = k - k.mean(2, keepdim=True)
        self.queries += torch.einsum("bhtd,bhte->hde", q * weight[:, None], q)
        self.keys += torch.einsum("bhtd,bhte->hde", k, k)


@dataclass(frozen=True, eq=False)
class LogitReduction:
    """Bases of the reduced queries and keys, and the error of every rank."""

    q: Tensor  # (H, D, r)
    k: Tensor  # (H, D, r)
    errors: Tensor  # (D + 1,): relative error over all heads when 0, 1, ... D dimensions per head are kept


def reduce_logits(moments: LogitMoments, rank: int) -> LogitReduction:
    """The rank-`rank` queries and keys of every head.

    Raises:
        DataError: a query or a key was not finite.
    """
    require_finite(moments.queries)
    require_finite(moments.keys)
    (a, a_inverse), (k, k_inverse) = _roots(moments.queries), _roots(moments.keys)
    left, s, right = torch.linalg.svd(a @ k)
    root = s[:, None, :rank].sqrt()
    q_basis, k_basis = a_inverse @ (left[..., :rank] * root), k_inverse @ (right.mT[..., :rank] * root)
    return LogitReduction(q_basis, k_basis, tail_errors(s.square()))


def tail_errors(energy: Tensor) -> Tensor:
    """Descending energies (H, D) -> (D + 1,): share that keeping the first 0, 1, ... D of every head loses."""
    total = energy.clamp(min=0).sum(0)
    lost = torch.cat([total.flip(0).cumsum(0).flip(0), total.new_zeros(1)])
    return lost / lost[0].clamp(min=1e-300)


def _roots(m: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of positive semi-definite (H, D, D) matrices and its inverse, eigenvalues floored."""
    values, vectors = torch.linalg.eigh(m)
    floor = FLOOR * values.mean(-1, keepdim=True)
    root = values.maximum(torch.where(floor > 0, floor, 1.0)).sqrt()[..., None, :]  # a dead head: any basis will do
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
