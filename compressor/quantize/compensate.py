"""The published compensation: a low-rank linear branch beside each residual branch that quantization hurts in its tail.

Kept for reference, and measured against by `bench/quantization.py`; what ``compress`` runs is `compressor.quantize.refine`.

It costs multiplies on the device, ``2 C r`` per token, and nothing in the weights can absorb it, since its input is the
stream before the norm. `refine` folds what can be folded at no cost; the two are measured side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.quantize.simulate import fake_quant_tap, on_grid
from compressor.types import Array, Model, Quantization
from compressor.vit import Block, Tap, to_torch

__all__ = [
    "Branch",
    "Budget",
    "LowRank",
    "LowRankConfig",
    "Threshold",
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
class Threshold:
    """The published gate: every branch whose TRE reaches `tre` is corrected."""

    tre: float = 0.007


@dataclass(frozen=True)
class Budget:
    """The branches that gain most are corrected, as many as may cost `share` of the model's multiply-adds or parameters."""

    share: float
    of: Literal["macs", "params"] = "macs"

    def __post_init__(self) -> None:
        if not self.share > 0 or self.of not in ("macs", "params"):
            raise ConfigError(f"Budget must have share > 0 of macs or params, got {self}.", hint="0.01 adds 1 %.")

    def pick(self, gains: Mapping[str, float], model: Model, rank: int) -> set[str]:
        """The sites to correct; all corrections of one model cost the same, so the largest gains are the best buy."""
        c = model.spec.embed_dim
        macs, params = 2 * c * rank * model.spec.tokens, 2 * c * rank + c
        each, total = (macs, model.spec.macs()) if self.of == "macs" else (params, model.params)
        return set(sorted(gains, key=lambda site: -gains[site])[: int(self.share * total / each)])


@dataclass(frozen=True)
class LowRankConfig:
    """Which branches get a correction and how large.

    Args:
        rank: r of each correction.
        tail: share of elements TRE looks at.
        gate: which branches are corrected, `Threshold` or `Budget`.
        damping: ridge, as a share of the mean input variance; 0 is the published least squares.
        truncate: `truncate_plain` as published, or `truncate_weighted`.
    """

    rank: int = 16
    tail: float = 0.1
    gate: Threshold | Budget = field(default_factory=Threshold)
    damping: float = 0.0
    truncate: Truncation = truncate_weighted

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.tail <= 1 or not 0 <= self.damping < math.inf:
            raise ConfigError(f"LowRankConfig must have rank >= 1, tail in (0, 1] and finite damping >= 0, got {self}.")


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
        config: see `LowRankConfig`; with a `Budget` a first walk without corrections tells what each would gain.

    Raises:
        DataError: no image.

    Source: TAPTQ, arXiv 2602.01741, after QwT (arXiv 2411.13918). Deviations: the intercept is refitted after the
    truncation; a branch is kept only where it helps on the half of the images it was not fitted to, in place of R^2 on the
    same ones; the budget, and its gain: the squared error that a correction takes off that half.
    """
    with torch.inference_mode():
        walk = _Walk(model, quantization, batches, config)
        if isinstance(config.gate, Threshold):
            least = config.gate.tre
            return walk.correct(lambda site, score: score >= least)
        chosen = config.gate.pick(walk.gains(), model, walk.rank)
        return walk.correct(lambda site, score: site in chosen)


class _Walk:
    """The float and the quantized network side by side, on the stream that the corrected quantized one leaves."""

    def __init__(
        self, model: Model, quantization: Quantization, batches: Iterable[Array], config: LowRankConfig
    ) -> None:
        self._float, self._quantized = to_torch(model), to_torch(on_grid(model, quantization.weights))
        self._tap, self._config = fake_quant_tap(quantization.activations), config
        streams = [self._quantized.embed(torch.from_numpy(b), self._tap) for b in batches]
        if not sum(map(len, streams)):
            raise DataError("low_rank: calibration data must hold at least one image, got none.")
        self._start = torch.cat(streams)
        self.rank = min(config.rank, model.spec.embed_dim)
        self._macs = 2 * model.spec.embed_dim * self.rank * model.spec.tokens

    def gains(self) -> dict[str, float]:
        """By site, the squared error of held-out images that a correction of this branch alone would take off it."""
        stream, found = self._start, {}
        for site, exact, rounded in self._branches():
            y_q = _run(rounded, stream)
            found[site] = _gain(stream, _run(exact, stream) - y_q, self._config)
            stream = stream + y_q
        return found

    def correct(self, admits: Callable[[str, float], bool]) -> LowRank:
        """Corrections of the branches whose site and TRE `admits` lets pass, where they help on held-out images."""
        stream = self._start
        branches: dict[str, Branch] = {}
        scores: dict[str, float] = {}
        for site, exact, rounded in self._branches():
            y, y_q = _run(exact, stream), _run(rounded, stream)
            scores[site] = tail_relative_error(y, y_q, self._config.tail)
            if admits(site, scores[site]) and _gain(stream, y - y_q, self._config) > 0:
                branches[site] = _solve(stream, y - y_q, self._config)
                y_q = y_q + branches[site](stream)
            stream = stream + y_q
        return LowRank(branches, scores, len(branches) * self._macs)

    def _branches(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
        """Site of every residual branch in network order, with the float branch and the quantized one."""
        for i, (dense, small) in enumerate(zip(self._float.blocks, self._quantized.blocks, strict=True)):
            assert isinstance(dense, Block) and isinstance(small, Block)
            for part, exact, rounded in (("attn", dense.attention, small.attention), ("mlp", dense.mlp, small.mlp)):
                yield f"blocks.{i}.{part}", exact, partial(rounded, tap=self._tap, name=f"blocks.{i}")


def _run(branch: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    """`branch` of all images, a few at a time."""
    return torch.cat([branch(stream[i : i + 32]) for i in range(0, len(stream), 32)])


def _gain(stream: Tensor, delta: Tensor, config: LowRankConfig) -> float:
    """The squared error that the even images' fit takes off the odd ones; infinite where there are none to ask."""
    held_out = delta[1::2]
    if not len(held_out):
        return float("inf")
    left = held_out - _solve(stream[::2], delta[::2], config)(stream[1::2])
    return float(held_out.square().sum() - left.square().sum())


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
