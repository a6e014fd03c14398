"""Cutting a torch block to size: each function replaces linears of a block that belongs to the caller.

While a block is being fitted, `proj` and `fc2` are identities, so that its branches return what those linears read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressor.prune.regress import Fold
from compressor.vit import Block, VisionTransformer

__all__ = [
    "blocks_of",
    "close_attention",
    "close_mlp",
    "double",
    "fold_heads",
    "fold_inputs",
    "keep_heads",
    "keep_units",
    "linear",
    "opened",
    "queries_keys",
]


def blocks_of(module: VisionTransformer) -> list[Block]:
    """The blocks, typed."""
    return [block for block in module.blocks if isinstance(block, Block)]


def opened(block: Block) -> Block:
    """A copy of `block` whose branches end in what `proj` and `fc2` read."""
    small = copy.deepcopy(block)
    for name in ("proj", "fc2"):
        setattr(small, name, nn.Identity())
    return small


def keep_heads(small: Block, heads: Sequence[int]) -> Tensor:
    """Delete the other heads' queries, keys and values; the columns of `proj` that stay."""
    spec, device = small.spec, small.q.weight.device

    def rows(width: int) -> Tensor:
        return torch.cat([torch.arange(h * width, (h + 1) * width, device=device) for h in heads])

    for name, width in (("q", spec.qk_dim), ("k", spec.qk_dim), ("v", spec.v_dim)):
        old = getattr(small, name)
        setattr(small, name, linear(old.weight[rows(width)], old.bias[rows(width)]))
    small.spec = replace(spec, heads=len(heads))
    return rows(spec.v_dim)


def fold_heads(small: Block, name: str, basis: Tensor) -> None:
    """Replace projection `name` by its products with each head's basis (H, D, r)."""
    old = getattr(small, name)
    weight = basis.mT @ double(old.weight).reshape(*basis.shape[:2], -1)  # (H, r, C)
    bias = basis.mT @ double(old.bias).reshape(*basis.shape[:2], 1)
    setattr(small, name, linear(weight.flatten(0, 1), bias.flatten()))


def fold_inputs(small: Block, names: Sequence[str], fitted: Fold) -> None:
    """Let the linears of these names read the fitted map of their input."""
    for name in names:
        old = getattr(small, name)
        weight = double(old.weight)
        setattr(small, name, linear(weight @ fitted.weight, double(old.bias) + weight @ fitted.bias))


def keep_units(small: Block, kept: Tensor) -> None:
    """Delete the other hidden units' rows of fc1 (and of the gate)."""
    for name in ("fc1", "gate") if small.spec.mlp == "swiglu" else ("fc1",):
        old = getattr(small, name)
        setattr(small, name, linear(old.weight[kept], old.bias[kept]))


def close_attention(small: Block, fitted: Fold) -> None:
    """End the attention branch in the fitted output projection."""
    small.proj = linear(fitted.weight, fitted.bias)


def close_mlp(small: Block, fitted: Fold) -> None:
    """End the MLP branch in the fitted fc2."""
    small.fc2 = linear(fitted.weight, fitted.bias)


def queries_keys(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """q and k (B, H, T, D) of the block, before any norm."""
    y = block.norm1(tokens)
    shape = (*y.shape[:2], block.spec.heads, block.spec.qk_dim)
    return block.q(y).reshape(shape).transpose(1, 2), block.k(y).reshape(shape).transpose(1, 2)


def double(x: Tensor) -> Tensor:
    """Float64, without history."""
    return x.detach().double()


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A float32 linear of these numbers, without gradients."""
    new = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    new.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
    new.bias = nn.Parameter(bias.float().contiguous(), requires_grad=False)
    return new
