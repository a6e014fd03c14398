"""``--pruner obs``: closed-form pruning of every width of the network from unlabelled images, without gradients.

The order of things: which blocks go (`importance`), how large every part of the others becomes (one ratio for all, or
`allocate` under a budget), then the sequential fit (`sequential`). Nothing is published under this name; each part
names the work it builds on. Against CORP (arXiv 2602.05243): any basis instead of coordinates for Q/K, selection by
the error with compensation instead of a score without, V/O, heads and blocks too, and fits on the compressed prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError, unknown_name
from compressor.prune.allocate import allocate, measure_curves
from compressor.prune.importance import least_important, weight_entropy
from compressor.prune.records import BlockReport, Part, Pruned
from compressor.prune.sequential import SequentialPass
from compressor.prune.stream import TokenStream
from compressor.prune.surgery import blocks_of
from compressor.types import Array, BlockSpec, Model, VitSpec
from compressor.vit import VisionTransformer, to_torch

__all__ = ["ObsConfig", "prune"]

# Share of the errors' weight at the last block that goes to the tokens the classifier reads, as the others have no later
# block to act through; it grows evenly from the first block. Chosen on held-out calibration images of two trained models.
POOLED_SHARE = 0.5
FEW = 64  # images that importance and allocation are measured on
IMPORTANCES = ("output", "entropy")
RATIOS: dict[Part, tuple[str, str]] = {
    "mlp": ("mlp_dim", "mlp_ratio"),
    "qk": ("qk_dim", "qk_ratio"),
    "vo": ("v_dim", "vo_ratio"),
    "heads": ("heads", "head_ratio"),
}
COSTS: dict[str, Callable[[VitSpec], int]] = {"macs": VitSpec.macs, "params": VitSpec.params}


@dataclass(frozen=True)
class ObsConfig:
    """What to remove.

    Args:
        mlp_ratio: share of every block's hidden units removed, in [0, 1).
        qk_ratio: share of every head's query/key dimensions removed.
        vo_ratio: share of every head's value dimensions removed.
        head_ratio: share of every block's heads removed.
        drop_blocks: whole blocks removed, the least important first.
        importance: of blocks: ``output``, by what the output does without them, or ``entropy``, by their weights alone.
        target: (``macs`` or ``params``, share of the dense network to keep); sizes are then chosen part by part.
        damping: share of the mean variance that pulls fits to the dense weights; ``auto`` by held-out error.
        width_multiple: hidden units and head dimensions are rounded to multiples of it.
        value_rows: what the network's form on the chip adds to every head's values; with them they are such a multiple.
    """

    mlp_ratio: float = 0.0
    qk_ratio: float = 0.0
    vo_ratio: float = 0.0
    head_ratio: float = 0.0
    drop_blocks: int = 0
    importance: Literal["output", "entropy"] = "output"
    target: tuple[Literal["macs", "params"], float] | None = None
    damping: float | Literal["auto"] = "auto"
    width_multiple: int = 1
    value_rows: int = 0

    def __post_init__(self) -> None:
        ratios = {n: getattr(self, n) for n in ("mlp_ratio", "qk_ratio", "vo_ratio", "head_ratio")}
        for name, value in ratios.items():
            if not 0 <= value < 1:
                raise ConfigError(f"ObsConfig.{name} must be in [0, 1), got {value}.", hint="0.5 removes half.")
        if self.target is not None:
            kind, share = self.target
            if kind not in COSTS:
                raise unknown_name("ObsConfig.target", kind, COSTS)
            if not 0 < share < 1:
                raise ConfigError(f"target_{kind} must be in (0, 1), got {share}.", hint="0.6 keeps 60 %.")
            if max(ratios.values()) > 0:
                raise ConfigError(
                    f"target_{kind} must not be combined with ratios, got {ratios}.", hint="Give one kind."
                )
        if self.importance not in IMPORTANCES:
            raise unknown_name("ObsConfig.importance", self.importance, IMPORTANCES)
        if self.drop_blocks < 0:
            raise ConfigError(f"ObsConfig.drop_blocks must be at least 0, got {self.drop_blocks}.")
        if self.width_multiple < 1:
            raise ConfigError(f"ObsConfig.width_multiple must be at least 1, got {self.width_multiple}.")
        if not 0 <= self.value_rows < self.width_multiple:
            raise ConfigError(
                f"ObsConfig.value_rows must be at least 0 and below width_multiple, got {self.value_rows}."
            )
        if self.damping != "auto" and not (isinstance(self.damping, int | float) and 0 < self.damping < math.inf):
            raise ConfigError(f"ObsConfig.damping must be auto or a positive number, got {self.damping!r}.")


def prune(
    model: Model, batches: Callable[[], Iterable[Array]], config: ObsConfig, device: torch.device | str
) -> Pruned:
    """`model` reduced as `config` says, every part that stays refitted to make up for what went.

    Args:
        model: canonical model; not changed.
        batches: a pass over the calibration images, float32 (B, C, h, w); called once.
        config: what to remove.
        device: where the passes and the linear algebra run.

    Raises:
        ConfigError: more blocks to drop than leave one, or a target that cannot be reached.
        DataError: no images.
    """
    if config.drop_blocks >= len(model.spec.blocks):
        raise ConfigError(
            f"drop_blocks must leave at least one of {len(model.spec.blocks)} blocks, got {config.drop_blocks}.",
            hint="Drop fewer blocks.",
        )
    if config == ObsConfig(importance=config.importance, damping=config.damping, width_multiple=config.width_multiple):
        return Pruned(model, ())
    dense = to_torch(model, device)
    with torch.inference_mode():
        tokens = TokenStream(torch.device(device))
        for batch in batches():
            tokens.append(dense.embed(torch.from_numpy(batch).to(device)))
        if len(tokens) == 0:
            raise DataError("Calibration data must hold at least one image, got none.", hint="Point --data at images.")
        weights = [w.to(device) for w in token_weights(model.spec)]
        dropped: dict[int, float] = {}
        if config.drop_blocks > 0:
            few = torch.cat(list(tokens.first(FEW)))
            dropped = least_important(dense, few, config.drop_blocks, _candidates(model, config))
        sizes = _sizes(dense, tokens, weights, config, dropped)
        run = SequentialPass(tokens, weights, None if config.damping == "auto" else float(config.damping))
        result = _sequential(model, dense, run, sizes)
    gone = [BlockReport(i, "block", 1, 0, error, 0.0) for i, error in dropped.items()]
    reports = [*_with_whole(result.blocks, dense.spec, sizes, config), *gone]
    return replace(result, blocks=tuple(sorted(reports, key=lambda r: r.block)))


def token_weights(spec: VitSpec) -> list[Tensor]:
    """(T,) of mean 1 per block: tokens that the classifier reads by name count for a share that grows with depth."""
    read = {"token": 1, "token_dist": 2, "token_avg": 1, "avg": 0}[spec.pool]
    weights = []
    for index in range(len(spec.blocks)):
        weight = torch.ones(spec.tokens)
        if 0 < read < spec.tokens:
            share = max(POOLED_SHARE * (index + 1) / len(spec.blocks), read / spec.tokens)
            weight[:read] = share * spec.tokens / read
            weight[read:] = (1 - share) * spec.tokens / (spec.tokens - read)
        weights.append(weight)
    return weights


def _candidates(model: Model, config: ObsConfig) -> Collection[int]:
    """The blocks that may be dropped: all, or those of least entropy."""
    blocks = range(len(model.spec.blocks))
    if config.importance == "output":
        return blocks
    entropy = weight_entropy(model)
    return sorted(blocks, key=lambda i: entropy[i])[: config.drop_blocks]


def _sizes(
    dense: VisionTransformer, tokens: TokenStream, weights: list[Tensor], config: ObsConfig, dropped: Collection[int]
) -> list[BlockSpec | None]:
    """The size of every block of the dense network; None where it is dropped."""
    alive = [i for i in range(len(dense.blocks)) if i not in dropped]
    if config.target is None:
        return [uniform(b, config) if i in alive else None for i, b in enumerate(dense.spec.blocks)]
    kind, share = config.target
    curves = [
        replace(c, block=alive.index(c.block))
        for c in measure_curves(dense, tokens.first(FEW), weights)
        if c.block in alive
    ]
    start = replace(dense.spec, blocks=tuple(dense.spec.blocks[i] for i in alive))
    budget = share * COSTS[kind](dense.spec)
    chosen = dict(zip(alive, allocate(start, curves, COSTS[kind], budget, config.width_multiple).blocks, strict=True))
    return [chosen.get(i) for i in range(len(dense.blocks))]


def uniform(block: BlockSpec, config: ObsConfig) -> BlockSpec:
    """`block` with the same share of everything gone: ``int(width * ratio)``, then rounded to the multiple.

    >>> uniform(BlockSpec(12, 64, 64, 3072), ObsConfig(mlp_ratio=0.3, vo_ratio=0.6, width_multiple=8, value_rows=1))
    BlockSpec(heads=12, qk_dim=64, v_dim=23, mlp_dim=2152, mlp='gelu', qk_norm=False)
    """

    def left(width: int, ratio: float, multiple: int, rows: int = 0) -> int:
        kept = width - int(width * ratio)
        return width if kept == width else min(width, max(1, round((kept + rows) / multiple)) * multiple - rows)

    return replace(
        block,
        heads=left(block.heads, config.head_ratio, 1),
        qk_dim=left(block.qk_dim, config.qk_ratio, config.width_multiple),
        v_dim=left(block.v_dim, config.vo_ratio, config.width_multiple, config.value_rows),
        mlp_dim=left(block.mlp_dim, config.mlp_ratio, config.width_multiple),
    )


def _with_whole(
    reports: Iterable[BlockReport], dense: VitSpec, sizes: list[BlockSpec | None], config: ObsConfig
) -> list[BlockReport]:
    """`reports`, and of every width that a ratio should have reduced and rounding left whole, that it did."""
    found = {(report.block, report.part): report for report in reports}
    for i, (block, size) in enumerate(zip(dense.blocks, sizes, strict=True)):
        for part, (name, ratio) in RATIOS.items():
            width, share = getattr(block, name), getattr(config, ratio)
            if size is not None and share > 0 and getattr(size, name) == width:
                step = 1 if part == "heads" else config.width_multiple
                whole = f"kept whole: {share:g} of {width} is less than a step of {step}"
                report = found.get((i, part), BlockReport(i, part, width, width, 0.0, 0.0))
                found[i, part] = replace(report, fallback="; ".join(filter(None, (report.fallback, whole))))
    return list(found.values())


def _sequential(model: Model, dense: VisionTransformer, run: SequentialPass, sizes: list[BlockSpec | None]) -> Pruned:
    """Fit block after block; blocks dropped at the very front are made up for in the positions."""
    alive = [i for i, size in enumerate(sizes) if size is not None]
    reports: list[BlockReport] = []
    changed: dict[str, Array] = {}
    if alive[0] > 0:
        constant = run.skip(blocks_of(dense)[: alive[0]]).cpu().numpy()
        prefix = model.spec.prefix_tokens
        changed["prefix"] = model.weights["prefix"] + constant[:prefix]
        changed["pos"] = model.weights["pos"] + constant[prefix:]
    blocks, specs = blocks_of(dense), list[BlockSpec]()
    for i, following in zip(alive, [*alive[1:], len(sizes)], strict=True):
        size = sizes[i]
        if size is None:
            continue
        small, rows = run.compress(blocks[i], size, i, blocks[i + 1 : following])
        changed |= {f"blocks.{len(specs)}.{name}": p.cpu().numpy() for name, p in small.named_parameters()}
        specs.append(size)
        reports += rows
    spec = replace(model.spec, blocks=tuple(specs))
    return Pruned(model.with_weights(spec, changed), tuple(reports))
