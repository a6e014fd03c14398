"""How small each part of each block should be, for a share of the whole network's MACs or parameters.

Every part's error curve comes for free: squared singular values of the logits and of the values, and the costs of
greedy elimination. A curve says how the error grows, not how much it matters; that is measured once per part, as the
change of the network's output when only that part is reduced to half. The output's error is taken to be the sum over
parts of

    change at half * curve(size) / curve(half)

which is minimised under the budget on the lower convex hulls of the curves: always the cheapest next step.

Used whenever a budget is asked for; ratios mean what they say, the same share of every block. At equal MACs the
divergence from the dense network was 0.2 to 0.5 of that of one ratio for all (`bench/pruning.py`, two trained models).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import ConfigError
from compressor.prune.importance import output_error
from compressor.prune.mlp import eliminate
from compressor.prune.qk import reduce_logits
from compressor.prune.regress import DEFAULT, fold
from compressor.prune.sequential import branch_sums, logit_moments
from compressor.prune.stream import TokenStream
from compressor.prune.surgery import (
    blocks_of,
    close_attention,
    close_mlp,
    double,
    fold_heads,
    keep_units,
    opened,
)
from compressor.prune.vo import block_diagonal, reduce_values
from compressor.types import VitSpec
from compressor.vit import Block, VisionTransformer

__all__ = ["Curve", "allocate", "measure_curves"]

Width = Literal["qk_dim", "v_dim", "mlp_dim"]
SMALLEST = 16  # of a width, one part in so many always stays


@dataclass(frozen=True, eq=False)
class Curve:
    """What the network's output loses when one width of one block is reduced."""

    block: int
    width: Width
    errors: Tensor  # (full + 1,) by what is kept, 0 at full; non-increasing; only sizes from full / SMALLEST on count


def allocate(
    spec: VitSpec, curves: Sequence[Curve], cost: Callable[[VitSpec], int], budget: float, multiple: int
) -> VitSpec:
    """The sizes of least total error with ``cost(spec) <= budget``.

    Args:
        spec: sizes to start from.
        curves: of every width that may shrink.
        cost: MACs or parameters of a spec.
        budget: in the same unit.
        multiple: widths are multiples of this, or whole.

    Raises:
        ConfigError: not even the smallest sizes meet the budget.
    """
    steps = []
    for curve in curves:
        (sizes, errors), rate = _hull(curve, multiple), 0.0
        unit = cost(spec) - cost(_resized(spec, curve.block, curve.width, len(curve.errors) - 2))
        for i in range(1, len(sizes)):
            saved = (sizes[i - 1] - sizes[i]) * unit
            rate = max(rate, (errors[i] - errors[i - 1]) / saved)  # a convex curve's grow, but for rounding
            steps.append((rate, curve.block, curve.width, sizes[i]))
    for _, block, width, size in sorted(steps, key=lambda step: (*step[:3], -step[3])):  # never larger than it is
        if cost(spec) <= budget:
            return spec
        spec = _resized(spec, block, width, size)
    if cost(spec) <= budget:
        return spec
    raise ConfigError(
        f"target must be reachable, got {budget:,.0f} where the smallest sizes cost {cost(spec):,}.",
        hint="Raise the target, or drop blocks with --drop-blocks.",
    )


def _hull(curve: Curve, multiple: int) -> tuple[list[int], list[float]]:
    """Sizes, largest first, on the lower convex hull of (size, error), and their errors."""
    full = len(curve.errors) - 1
    least = max(-(-full // SMALLEST // multiple) * multiple, multiple)
    sizes = [full, *(s for s in range(full - full % multiple, least - 1, -multiple) if 0 < s < full)]
    hull: list[tuple[int, float]] = []
    for size in sizes:
        point = (size, curve.errors[size].item())
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [size for size, _ in hull], [error for _, error in hull]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])


def _resized(spec: VitSpec, block: int, width: Width, size: int) -> VitSpec:
    blocks = list(spec.blocks)
    blocks[block] = replace(blocks[block], **{width: size})  # type: ignore[arg-type]
    return replace(spec, blocks=tuple(blocks))


def measure_curves(module: VisionTransformer, tokens: TokenStream, weights: Sequence[Tensor]) -> list[Curve]:
    """The curves of every width of every block, on the dense stream of a few images.

    Queries and keys under a norm have no curve, nor has a width of 1: they keep their size.

    Args:
        module: the dense network.
        tokens: embedded calibration images; not changed.
        weights: (T,) per block, how much each token's own error matters.
    """
    blocks = blocks_of(module)
    expected = _outputs(module, blocks, tokens)
    curves, before = [], tokens
    for index, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        middle = before.mapped(partial(_add, block.attention))
        after = middle.mapped(partial(_add, block.mlp))
        found: list[tuple[Width, Tensor, TokenStream]] = []
        if not block.spec.qk_norm and block.spec.qk_dim > 1:
            found.append(_queries(block, before, weight))
        if block.spec.v_dim > 1:
            found.append(_values(block, before, middle, weight))
        found = [(width, errors, x.mapped(partial(_add, block.mlp))) for width, errors, x in found]
        if block.spec.mlp_dim > 1:
            found.append(_units(block, middle, after, weight))
        for width, errors, changed in found:
            change = output_error(expected, _outputs(module, blocks[index + 1 :], changed))
            half = errors[(len(errors) - 1) // 2].clamp(min=1e-300)
            curves.append(Curve(index, width, errors * (change / half)))
        before = after
    return curves


def _queries(block: Block, before: TokenStream, weight: Tensor) -> tuple[Width, Tensor, TokenStream]:
    """Curve of the query/key width, and the stream behind the attention with half of it."""
    reduced = reduce_logits(logit_moments(block, before, weight), block.spec.qk_dim // 2)
    small = copy.deepcopy(block)
    fold_heads(small, "q", reduced.q)
    fold_heads(small, "k", reduced.k)
    return "qk_dim", reduced.errors, before.mapped(partial(_add, small.attention))


def _values(block: Block, before: TokenStream, goal: TokenStream, weight: Tensor) -> tuple[Width, Tensor, TokenStream]:
    """Curve of the value width, and the stream behind the attention with half of it."""
    spec, anchor, small = block.spec, double(block.proj.weight), opened(block)
    fit, held = branch_sums(small.attention, before, goal, weight)
    basis, errors = reduce_values(fit.objective(held).damped(DEFAULT, anchor), spec.heads, spec.v_dim // 2)
    fold_heads(small, "v", basis)
    close_attention(small, fold(fit, held, anchor, block_diagonal(basis), DEFAULT))
    return "v_dim", errors, before.mapped(partial(_add, small.attention))


def _units(block: Block, middle: TokenStream, goal: TokenStream, weight: Tensor) -> tuple[Width, Tensor, TokenStream]:
    """Curve of the hidden width, and the stream behind the MLP with half of it."""
    width, anchor, small = block.spec.mlp_dim, double(block.fc2.weight), opened(block)
    fit, held = branch_sums(small.mlp, middle, goal, weight)
    gone = eliminate(fit.objective(held).damped(DEFAULT, anchor), max(width // SMALLEST, 1))
    added = gone.added.cumsum(0)
    errors = torch.cat([added[-1:].expand(width - len(added)), added.flip(0), added.new_zeros(1)])
    kept = gone.kept(width, width // 2)
    keep_units(small, kept)
    close_mlp(small, fold(fit, held, anchor, kept, DEFAULT))
    return "mlp_dim", errors, middle.mapped(partial(_add, small.mlp))


def _add(branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return x + branch(x)


def _outputs(module: VisionTransformer, blocks: Iterable[Block], tokens: TokenStream) -> Tensor:
    """(images, classes) of what enters `blocks`."""
    outputs = []
    for x in tokens:
        for block in blocks:
            x = block(x)
        outputs.append(module.classify(x))
    return torch.cat(outputs)
