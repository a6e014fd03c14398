"""Queries and keys of fewer dimensions where a norm stands between projection and logits.

LayerNorm over a head's dimensions does not commute with a change of basis, and its weights are shared by all heads. So
coordinates are removed, the same in every head, and the norms' weights and the query bias are fitted again:

    selection   sum_s m_s q_s k_s with all m = 1 is the dense logit; its quadratic in m has hessian G = sum_h A_h o Kc_h
                (A, Kc as in `qk`, of the normalised queries and keys; o is element by element), eliminated as in `mlp`
    refit       q' = w_q o f_q + b_q,  k' = w_k o f_k,  f the norm of the kept coordinates; alternating least squares of
                E (q'^T k' - q^T k)^2, in which each of (w_q, b_q) and w_k is linear while the other stands
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.least_squares import Quadratic
from compressor.prune.mlp import eliminate
from compressor.prune.qk import FLOOR, LogitMoments
from compressor.prune.stream import TokenStream
from compressor.prune.surgery import double, linear, queries_keys
from compressor.vit import Block

__all__ = ["reduce_coordinates"]

SWEEPS = 5  # of alternating least squares; the error falls in each


def reduce_coordinates(small: Block, rank: int, tokens: TokenStream, weight: Tensor) -> float:
    """Cut the block's q, k and their norms to `rank` coordinates per head; the relative error of its logits.

    Args:
        small: the block, changed in place except for its spec.
        rank: coordinates that stay.
        tokens: the stream that enters it.
        weight: (T,) of each token's own output.
    """
    spec = small.spec
    q_norm, k_norm = small.q_norm, small.k_norm
    moments = LogitMoments(spec.heads, spec.qk_dim, weight.device)
    for x in tokens:
        q, k = queries_keys(small, x)
        moments.add(q_norm(q), k_norm(k), weight)
    hessian = (moments.queries * moments.keys).sum(0)
    hessian = hessian + (FLOOR * hessian.trace() / len(hessian) + 1e-300) * torch.eye(len(hessian)).to(hessian)
    kept = eliminate(Quadratic(hessian, hessian.sum(0, keepdim=True)), rank).kept(spec.qk_dim, rank)
    joint = LogitMoments(spec.heads, rank + 1 + spec.qk_dim, weight.device)
    for x in tokens:
        q, k = queries_keys(small, x)
        joint.add(_beside(q, kept, q_norm), _beside(k, kept, k_norm), weight)
    w_q, b_q, w_k, error = _alternate(joint, kept, double(q_norm.weight)[kept], double(q_norm.bias)[kept])
    for name in ("q", "k"):
        old = getattr(small, name)
        rows = (torch.arange(spec.heads, device=kept.device)[:, None] * spec.qk_dim + kept).flatten()
        setattr(small, name, linear(old.weight[rows], old.bias[rows]))
    small.q_norm, small.k_norm = _norm(w_q, b_q, q_norm.eps), _norm(w_k, torch.zeros_like(w_k), k_norm.eps)
    return error


def _beside(x: Tensor, kept: Tensor, norm: nn.LayerNorm) -> Tensor:
    """[f (r), 1, dense normalised x (D)] side by side, (B, H, T, r + 1 + D)."""
    small = F.layer_norm(x[..., kept], (len(kept),), eps=norm.eps)
    return torch.cat([small, torch.ones_like(small[..., :1]), norm(x)], dim=-1)


def _alternate(joint: LogitMoments, kept: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """w_q, b_q, w_k (r,) and the relative error of the logits they give."""
    r = len(kept)
    a, c = joint.queries, joint.keys  # (H, r + 1 + D, same)
    dense_q, dense_k = a[:, r + 1 :, r + 1 :], c[:, r + 1 :, r + 1 :]
    energy = (dense_q * dense_k).sum().item()
    w_k = torch.ones_like(w)
    error = 1.0
    for _ in range(SWEEPS):
        mix = torch.zeros(r, a.shape[1]).to(a)  # q' = mix [f, 1, dense q]
        mix[:, :r], mix[:, r] = torch.diag(w), b
        normal = (mix @ a @ mix.mT * c[:, :r, :r]).sum(0)
        right = ((mix @ a[:, :, r + 1 :]) * c[:, :r, r + 1 :]).sum((0, 2))
        w_k = _solve(normal, right)
        keys, cross = w_k[:, None] * c[:, :r, :r] * w_k, w_k[:, None] * c[:, :r, r + 1 :]  # of k', and with dense k
        ones = a[:, r : r + 1, r : r + 1].expand(-1, r, r)
        mixed = a[:, :r, r : r + 1].expand(-1, -1, r)
        top = torch.cat([a[:, :r, :r] * keys, mixed * keys], 2)
        bottom = torch.cat([mixed.mT * keys, ones * keys], 2)
        right = torch.cat([(a[:, part, r + 1 :] * cross).sum((0, 2)) for part in (slice(r), slice(r, r + 1))])
        solution = _solve(torch.cat([top, bottom], 1).sum(0), right)
        w, b = solution[:r], solution[r:]
        error = max(1 - (solution @ right).item() / max(energy, 1e-300), 0.0)
    return w, b, w_k, error


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """normal^-1 right for a positive semi-definite `normal`, slightly damped."""
    damped = normal + (FLOOR * normal.diagonal().mean() + 1e-300) * torch.eye(len(normal)).to(normal)
    solution: Tensor = torch.linalg.solve(damped, right)
    return solution


def _norm(weight: Tensor, bias: Tensor, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weight), eps, device="meta")
    norm.weight = nn.Parameter(weight.float(), requires_grad=False)
    norm.bias = nn.Parameter(bias.float(), requires_grad=False)
    return norm
