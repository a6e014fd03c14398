"""The published compensation: a low-rank linear branch beside each residual branch that quantization hurts in its tail.

It costs multiplies on the device, ``2 C r`` per token, and nothing in the weights can absorb it, since its input is the
stream before the norm. `compressor.quantize.refine` folds what can be folded at no cost; the two are measured side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantize.simulate import fake_quant_tap, on_grid
from compressor.types import Array, Model, Quantization
from compressor.vit import Block, Tap, to_torch

__all__ = [
    "Branch",
    "LowRank",
    "LowRankConfig",
    "low_rank",
    "tail_relative_error",
    "truncate_plain",
    "truncate_weighted",
]

Truncation = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def tail_relative_error(reference: Tensor, quantized: Tensor, share: float) -> float:
    """Squared error over energy, both on the `share` of elements where |reference| is largest.

    >>> round(tail_relative_error(torch.tensor([10.0, 1.0]), torch.tensor([9.0, 0.0]), 0.5), 6)
    0.01

    Source: TRE of TAPTQ, arXiv 2602.01741.
    """
    y, error = reference.flatten().double(), (reference - quantized).flatten().double()
    tail = y.abs().topk(max(1, int(share * y.numel()))).indices
    return float(error[tail].square().sum() / (y[tail].square().sum() + 1e-8))


def truncate_plain(weight: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(C, r) and (r, C) whose product is nearest to `weight`: the published truncation."""
    del second  # Unused
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def truncate_weighted(weight: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(C, r) and (r, C) whose product's output is nearest to that of `weight` for inputs of second moment `second`."""
    values, vectors = torch.linalg.eigh(second)
    root = values.clamp_min(values.max() * 1e-9).sqrt()
    u, s, v = torch.linalg.svd(root[:, None] * (vectors.T @ weight), full_matrices=False)
    return vectors @ (u[:, :rank] * s[:rank] / root[:, None]), v[:rank]


@dataclass(frozen=True)
class LowRankConfig:
    """Which branches get a correction and how large.

    Args:
        rank: r of each correction.
        tail: share of elements TRE looks at.
        threshold: a branch is corrected when its TRE reaches it.
        damping: ridge, as a share of the mean input variance; 0 is the published least squares.
        truncate: `truncate_plain` as published, or `truncate_weighted`.
    """

    rank: int = 16
    tail: float = 0.1
    threshold: float = 0.007
    damping: float = 0.0
    truncate: Truncation = truncate_weighted

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.tail <= 1 or self.damping < 0:
            raise ConfigError(f"LowRankConfig must have rank >= 1, tail in (0, 1] and damping >= 0, got {self}.")


@dataclass(frozen=True, eq=False)
class Branch:
    """Correction ``x @ down @ up + bias`` added to the output of one residual branch; x is the stream entering it."""

    down: Tensor  # (C, r) float32
    up: Tensor  # (r, C) float32
    bias: Tensor  # (C,) float32

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.down @ self.up + self.bias


@dataclass(frozen=True, eq=False)
class LowRank:
    """Corrections by site (``blocks.i.attn``, ``blocks.i.mlp``), and the TRE that decided, for every branch."""

    branches: Mapping[str, Branch]
    scores: Mapping[str, float]
    macs: int  # extra multiplies per image

    def tap(self, inner: Tap) -> Tap:
        """`inner` followed by the corrections, for one forward pass at a time."""
        stream: list[Tensor] = []

        def tap(site: str, x: Tensor) -> Tensor:
            x = inner(site, x)
            _, _, part = site.rpartition(".")
            if part.isdigit():
                stream[:] = [x]
            elif part in ("attn", "mlp"):
                x = x + self.branches[site](stream[0]) if site in self.branches else x
                stream[0] = stream[0] + x
            return x

        return tap


def low_rank(model: Model, quantization: Quantization, batches: Iterable[Array], config: LowRankConfig) -> LowRank:
    """Corrections of the quantized model's residual branches, each fitted on the stream the ones before it leave.

    For each branch in network order, on the same input: the difference between the float branch and the quantized one is
    regressed linearly on the input of the branch, with intercept, then truncated.

    Args:
        model: the float model.
        quantization: its grids.
        batches: float32 arrays (B, C, h, w).
        config: see `LowRankConfig`.

    Source: TAPTQ, arXiv 2602.01741, after QwT (arXiv 2411.13918). Deviations: the intercept is refitted after the
    truncation; a branch is kept only where it helps on the half of the images it was not fitted to, in place of R^2 on the
    same ones.
    """
    float_, quantized = to_torch(model), to_torch(on_grid(model, quantization.weights))
    tap = fake_quant_tap(quantization.activations)
    branches: dict[str, Branch] = {}
    scores: dict[str, float] = {}
    with torch.inference_mode():
        stream = torch.cat([quantized.embed(torch.from_numpy(b), tap) for b in batches])
        if len(stream) == 0:
            raise DataError("low_rank: calibration data must hold at least one image, got none.")
        for i, (dense, small) in enumerate(zip(float_.blocks, quantized.blocks, strict=True)):
            assert isinstance(dense, Block) and isinstance(small, Block)
            for part, exact, rounded in (("attn", dense.attention, small.attention), ("mlp", dense.mlp, small.mlp)):
                site = f"blocks.{i}.{part}"
                y = _run(exact, stream)
                y_q = _run(partial(rounded, tap=tap, name=f"blocks.{i}"), stream)
                scores[site] = tail_relative_error(y, y_q, config.tail)
                branch = _fit(stream, y - y_q, config) if scores[site] >= config.threshold else None
                if branch is not None:
                    branches[site] = branch
                    y_q = y_q + branch(stream)
                stream = stream + y_q
    c = model.spec.embed_dim
    return LowRank(branches, scores, len(branches) * 2 * c * min(config.rank, c) * model.spec.tokens)


def _run(branch: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    """`branch` of all images, a few at a time."""
    return torch.cat([branch(stream[i : i + 32]) for i in range(0, len(stream), 32)])


def _fit(stream: Tensor, delta: Tensor, config: LowRankConfig) -> Branch | None:
    """The correction of one branch, or None where the even images' fit does not help the odd ones."""
    half = _solve(stream[::2], delta[::2], config)
    held_out = delta[1::2]
    if len(held_out) and not (held_out - half(stream[1::2])).square().sum() < held_out.square().sum():
        return None
    return _solve(stream, delta, config)


def _solve(stream: Tensor, delta: Tensor, config: LowRankConfig) -> Branch:
    x, y = stream.flatten(0, 1).double(), delta.flatten(0, 1).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    second = x.T @ x / len(x)
    damped = second.clone()
    damped.diagonal().add_(max(config.damping, 1e-8) * second.diagonal().mean())
    weight = torch.linalg.solve(damped, x.T @ (y - mean_y) / len(x))
    down, up = config.truncate(weight, second, config.rank)
    return Branch(down.float(), up.float(), (mean_y - mean_x @ down @ up).float())
