"""CORP: closed-form one-shot pruning of MLP hidden units and query/key dimensions, as its authors released it.

Source: CORP (arXiv 2602.05243) and its released code. All statistics come from the dense model, every block is pruned
and compensated from them by itself, the same share of every block. Notation: S kept, P removed, n tokens.

    MLP:  x_P ~ B x_S + c,  B = Sigma_PS (Sigma_SS + lambda I)^-1,  c = mu_P - B mu_S
          fc2' = fc2[:, S] + fc2[:, P] B,  bias += fc2[:, P] c
    Q/K:  G_Q M G_K + lambda M = C_Q C_K  (G = sum x_S x_S^T;  C_Q = sum q_S q_P^T,  C_K = sum k_P k_S^T, per head)
          T = I + M = U V^T,  q' = U^T q_S,  k' = V^T k_S

The canonical model keeps the softmax scale D^-0.5 inside q. So sums over q carry D^-0.5, and the released lambda
becomes lambda / D in the Q/K equation; the released scale r^-0.5 after pruning becomes a factor (D / r)^0.5 on q'.
The Q/K equation is solved in the eigenbases of G_Q and G_K, O(r^3), in place of the released r^2 x r^2 Kronecker
system.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import ConfigError, UnsupportedModel, unknown_name
from compressor.prune.rank import MLP_SALIENCIES, QK_SALIENCIES, MlpSaliency, QkSaliency, split
from compressor.prune.records import BlockReport, Pruned
from compressor.types import Array, BlockSpec, Model, Moments, Statistics

__all__ = ["CorpConfig", "prune"]

LAMBDA = 1e-3  # the released floor, absolute
RELATIVE = 1e-6  # the scale-free floor, as a share of the mean variance
MIN_UNITS, MIN_QK_DIM = 64, 8  # never fewer, unless the dense block has fewer
TINY = 1e-300  # keeps 0 / 0 at 0


@dataclass(frozen=True)
class CorpConfig:
    """Ratios removed, and a named choice for each weak spot of the release. Presets: `released` and `fixed`.

    Args:
        mlp_ratio: share of every block's hidden units removed, in [0, 1).
        qk_ratio: share of every head's query/key dimensions removed, in [0, 1).
        saliency: which hidden units go first.
        qk_saliency: ``same_token`` ranks by E[q_j^2 k_j^2] of one token (released); logits pair different tokens, which
            ``all_pairs`` ranks by.
        floor: least damping: ``absolute`` 1e-3 whatever the activations' scale (released), or ``relative`` to it.
        sums: ``float32`` rounds covariances and means to float32 before solving (released). ``float64`` solves with the sums
            as they are, added in float64 from products of float32 within each batch.
        symmetrize: replace T by its symmetric part before factoring it (released); any T factors exactly without.
        keep_scale: keep the softmax scale D^-0.5; released is r^-0.5, though U V^T restores the whole logit already.
    """

    mlp_ratio: float = 0.0
    qk_ratio: float = 0.0
    saliency: MlpSaliency = "energy_weightmagnitude"
    qk_saliency: QkSaliency = "same_token"
    floor: Literal["absolute", "relative"] = "absolute"
    sums: Literal["float32", "float64"] = "float32"
    symmetrize: bool = True
    keep_scale: bool = False

    def __post_init__(self) -> None:
        for name in ("mlp_ratio", "qk_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"CorpConfig.{name} must be in [0, 1), got {getattr(self, name)}.", hint="0.5 removes half."
                )
        known: dict[str, Collection[str]] = {
            "saliency": MLP_SALIENCIES,
            "qk_saliency": QK_SALIENCIES,
            "floor": ("absolute", "relative"),
            "sums": ("float32", "float64"),
        }
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise unknown_name(f"CorpConfig.{name}", str(getattr(self, name)), names)

    @classmethod
    def released(cls, mlp_ratio: float = 0.0, qk_ratio: float = 0.0) -> CorpConfig:
        """Every choice as in the authors' code."""
        return cls(mlp_ratio, qk_ratio)

    @classmethod
    def fixed(cls, mlp_ratio: float = 0.0, qk_ratio: float = 0.0) -> CorpConfig:
        """The same method with its faults repaired."""
        return cls(
            mlp_ratio,
            qk_ratio,
            qk_saliency="all_pairs",
            floor="relative",
            sums="float64",
            symmetrize=False,
            keep_scale=True,
        )


def prune(model: Model, stats: Statistics, config: CorpConfig) -> Pruned:
    """`model` with ``int(M * mlp_ratio)`` hidden units and ``int(D * qk_ratio)`` query/key dimensions per head removed.

    At least 64 units and 8 dimensions stay (all, where the block has fewer). The kept weights absorb what was removed.

    Args:
        model: canonical model; not changed.
        stats: of the dense model, with moments at every fc2, q and k, and pair energies.
        config: ratios and choices.

    Raises:
        UnsupportedModel: `qk_ratio` above 0 for a model that normalises q and k: the fold cannot pass the norm.
    """
    changed: dict[str, Array] = {}
    blocks, reports = [], []
    for i, block in enumerate(model.spec.blocks):
        if config.mlp_ratio > 0:
            block, weights, report = _prune_mlp(model, i, stats.moments[f"blocks.{i}.fc2"], config)
            changed |= weights
            reports.append(report)
        if config.qk_ratio > 0:
            block, weights, report = _prune_qk(model, i, block, stats, config)
            changed |= weights
            reports.append(report)
        blocks.append(block)
    spec = replace(model.spec, blocks=tuple(blocks))
    return Pruned(model.with_weights(spec, changed), tuple(reports))


Step = tuple[BlockSpec, dict[str, Array], BlockReport]


def _prune_mlp(model: Model, i: int, moments: Moments, config: CorpConfig) -> Step:
    block, name = model.spec.blocks[i], f"blocks.{i}"
    mean, cov = _centred(moments, config)
    rows = [part for part in ("gate", "fc1") if f"{name}.{part}.weight" in model.weights]
    w2, b2 = (_double(model.weights[f"{name}.fc2.{part}"], cov) for part in ("weight", "bias"))
    w_in = torch.stack([_double(model.weights[f"{name}.{part}.weight"], cov).norm(dim=1) for part in rows]).norm(dim=0)
    score = MLP_SALIENCIES[config.saliency](cov.diagonal() + mean.square(), w_in, w2.norm(dim=0))
    kept, gone = split(score, _remaining(block.mlp_dim, config.mlp_ratio, MIN_UNITS))
    damping = _shrinkage(cov[kept][:, kept], moments.count, config)
    b, fallback = _ridge(cov[kept][:, kept], cov[kept][:, gone], damping)
    w_gone = w2[:, gone]
    weight = w2[:, kept] + w_gone @ b
    bias = b2 + w_gone @ (mean[gone] - b @ mean[kept])
    change = torch.zeros_like(w2)
    change[:, kept], change[:, gone] = w_gone @ b, -w_gone
    index = kept.cpu().numpy()
    weights = {
        f"{name}.{part}.{kind}": model.weights[f"{name}.{part}.{kind}"][index]
        for part in rows
        for kind in ("weight", "bias")
    }
    weights |= {f"{name}.fc2.weight": _single(weight), f"{name}.fc2.bias": _single(bias)}
    predicted = max(_energy(change, cov), 0.0) / max(_energy(w2, cov), TINY)
    report = BlockReport(i, "mlp", block.mlp_dim, len(kept), predicted, damping, fallback=fallback)
    return replace(block, mlp_dim=len(kept)), weights, report


def _prune_qk(model: Model, i: int, block: BlockSpec, stats: Statistics, config: CorpConfig) -> Step:
    if block.qk_norm:
        raise UnsupportedModel(
            f"blocks.{i}: CORP's Q/K step must have no norm between the projection and the logits, got a q/k norm.",
            hint="Use --pruner obs, which prunes such models by coordinates, or set --qk-ratio 0.",
        )
    name, width = f"blocks.{i}", block.qk_dim
    (mq, cq), (mk, ck) = (_centred(stats.moments[f"{name}.{part}"], config) for part in ("q", "k"))
    count = stats.moments[f"{name}.q"].count
    a, k = (count * (c + m[..., :, None] * m[..., None, :]) for m, c in ((mq, cq), (mk, ck)))  # (H, D, D), uncentred
    pairs = torch.as_tensor(stats.pair_energy[name], device=a.device)
    score = QK_SALIENCIES[config.qk_saliency](pairs, a.diagonal(dim1=1, dim2=2), k.diagonal(dim1=1, dim2=2))
    kept, gone = split(score, _remaining(width, config.qk_ratio, MIN_QK_DIM))  # (H, r), (H, D - r)
    rank = kept.shape[1]
    g_q, g_k = _take(a, kept, kept), _take(k, kept, kept)
    mean_energy = (g_q.diagonal(dim1=1, dim2=2).mean() * g_k.diagonal(dim1=1, dim2=2).mean()).item()
    damping = LAMBDA / width if config.floor == "absolute" else RELATIVE * mean_energy
    t = torch.eye(rank, dtype=a.dtype, device=a.device) + _solve_two_sided(
        g_q, _take(a, kept, gone) @ _take(k, gone, kept), g_k, damping
    )
    u, v = _factor((t + t.mT) / 2 if config.symmetrize else t)
    if not config.keep_scale:
        u = u * (width / rank) ** 0.5
    weights = {}
    for part, fold in (("q", u), ("k", v)):
        for kind in ("weight", "bias"):
            dense = _double(model.weights[f"{name}.{part}.{kind}"], a).reshape(block.heads, width, -1)
            small = fold.mT @ dense.gather(1, kept[..., None].expand(-1, -1, dense.shape[2]))  # (H, r, C) or (H, r, 1)
            weights[f"{name}.{part}.{kind}"] = _single(small.flatten(0, 1) if kind == "weight" else small.flatten())
    predicted = _logit_error(a, k, kept, u @ v.mT)
    return replace(block, qk_dim=rank), weights, BlockReport(i, "qk", width, rank, predicted, damping)


def _centred(moments: Moments, config: CorpConfig) -> tuple[Tensor, Tensor]:
    """Mean and covariance in float64, rounded to float32 first where the release did."""
    mean, cov = (torch.as_tensor(m, dtype=torch.float64) for m in (moments.mean, moments.covariance))
    return (mean.float().double(), cov.float().double()) if config.sums == "float32" else (mean, cov)


def _shrinkage(cov: Tensor, count: int, config: CorpConfig) -> float:
    """lambda = max(floor, rho tr / p), rho being the oracle-approximating shrinkage intensity. Source: CORP's code."""
    p, trace, trace2 = len(cov), cov.trace().item(), cov.square().sum().item()
    floor = LAMBDA if config.floor == "absolute" else RELATIVE * trace / p
    spread = (count + 1 - 2 / p) * (trace2 - trace**2 / p)
    rho = min(1.0, ((1 - 2 / p) * trace2 + trace**2) / spread) if spread > 0 else 1.0
    return max(floor, rho * trace / p)


def _ridge(cov: Tensor, cross: Tensor, damping: float) -> tuple[Tensor, str]:
    """((cov + damping I)^-1 cross)^T; by pseudo-inverse when that is not positive definite, which is said."""
    damped = cov + damping * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.item() == 0:
        return torch.cholesky_solve(cross, factor).mT, ""
    return (torch.linalg.pinv(damped, hermitian=True) @ cross).mT, "pseudo-inverse: covariance is not positive definite"


def _solve_two_sided(g_q: Tensor, c: Tensor, g_k: Tensor, damping: float) -> Tensor:
    """M of g_q M g_k + damping M = c, all (H, r, r): diagonal in the eigenbases of g_q and g_k."""
    (a, e_a), (b, e_b) = torch.linalg.eigh(g_q), torch.linalg.eigh(g_k)
    scale = a.clamp(min=0)[..., :, None] * b.clamp(min=0)[..., None, :] + max(damping, TINY)
    solution: Tensor = e_a @ (e_a.mT @ c @ e_b / scale) @ e_b.mT
    return solution


def _factor(t: Tensor) -> tuple[Tensor, Tensor]:
    """U, V with U V^T = t, singular values at least 1e-6 (as released)."""
    left, s, right = torch.linalg.svd(t)
    root = s.clamp(min=1e-6).sqrt()[..., None, :]
    return left * root, right.mT * root


def _logit_error(a: Tensor, k: Tensor, kept: Tensor, fold: Tensor) -> float:
    """Relative energy of q^T N k over all pairs, N = I - (fold on the kept dimensions); a, k second moments."""
    n = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).repeat(len(a), 1, 1)
    heads = torch.arange(len(a), device=a.device)[:, None, None]
    n[heads, kept[:, :, None], kept[:, None, :]] -= fold
    return max(((n.mT @ a @ n) * k).sum().item(), 0.0) / max((a * k).sum().item(), TINY)


def _take(m: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """m[h, rows[h], columns[h]] for every head: (H, D, D) -> (H, rows, columns)."""
    heads = torch.arange(len(m), device=m.device)[:, None, None]
    return m[heads, rows[:, :, None], columns[:, None, :]]


def _energy(w: Tensor, cov: Tensor) -> float:
    """trace(w cov w^T): variance of w x."""
    return ((w @ cov) * w).sum().item()


def _remaining(total: int, ratio: float, least: int) -> int:
    """How many stay when ``int(total * ratio)`` go, but at least `least` or all."""
    return max(total - int(total * ratio), min(least, total))


def _double(array: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like)


def _single(x: Tensor) -> Array:
    return x.float().cpu().numpy()
