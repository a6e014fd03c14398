"""One streamed pass over the calibration images: what every later stage wants to know about the activations.

Activations of the set are never held: each batch is reduced at its site and forgotten. Device-agnostic: sums live
where the module's weights live.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calibration.moments import HistogramSum, MomentSum, PairEnergySum
from compressor.errors import ConfigError, DataError
from compressor.types import Array, Statistics, VitSpec
from compressor.vit import VisionTransformer

__all__ = ["ObservePlan", "Part", "observe", "token_index"]

Part = Literal["patch", "qkv", "q", "k", "v", "proj", "fc1", "fc2", "head"]
PER_HEAD = ("q", "k", "v")


@dataclass(frozen=True)
class ObservePlan:
    """What to record, by the last word of the tap's site ("fc2" means every ``blocks.i.fc2``).

    Moments are for `compressor.prune.corp`, histograms for `compressor.quantize.plan.quantize`.

    `tokens_per_image` caps how many tokens of an image are read, None reads all: every prefix token always, and patch
    tokens at even strides for what is left of the cap, one at least. Neighbouring patches say much the same, so more
    images tell more than more tokens. The default reads all tokens of a small model, and a third of the 197 of a 224-pixel
    one, which keeps the pass within 1.5 plain forward passes.
    """

    moments: tuple[Part, ...] = ("fc2", "q", "k", "v", "proj")
    histograms: tuple[Part, ...] = ("patch", "qkv", "proj", "fc1", "fc2", "head")
    pair_energy: bool = True
    tokens_per_image: int | None = 64

    def __post_init__(self) -> None:
        if self.tokens_per_image is not None and self.tokens_per_image < 1:
            raise ConfigError(f"ObservePlan.tokens_per_image must be at least 1, got {self.tokens_per_image}.")


def token_index(spec: VitSpec, limit: int | None) -> list[int]:
    """Which tokens of an image are read: every prefix token, then patch tokens at even strides, up to `limit` in all.

    One patch token is read however many prefix tokens there are.

    >>> from compressor.types import BlockSpec
    >>> token_index(VitSpec((8, 8), (2, 2), 3, 4, (BlockSpec(1, 4, 4, 4),)), 5)
    [0, 1, 5, 9, 13]
    >>> token_index(VitSpec((8, 8), (2, 2), 3, 4, (BlockSpec(1, 4, 4, 4),), prefix_tokens=5), 3)
    [0, 1, 2, 3, 4, 5]
    """
    prefix, patches = spec.prefix_tokens, spec.tokens - spec.prefix_tokens
    wanted = patches if limit is None else min(patches, max(limit - prefix, 1))
    return [*range(prefix), *(prefix + i * patches // wanted for i in range(wanted))]


class _Observer:
    """The tap: reduces what passes by and returns it unchanged."""

    def __init__(self, module: VisionTransformer, plan: ObservePlan) -> None:
        self._plan = plan
        self._device = module.pos.device
        index = token_index(module.spec, plan.tokens_per_image)
        self._index = None if len(index) == module.spec.tokens else torch.tensor(index, device=self._device)
        self.moments: dict[str, MomentSum] = {}
        self.histograms: dict[str, HistogramSum] = {}
        self.pairs: dict[str, PairEnergySum] = {}
        self._query: Tensor | None = None  # of the block under way, until its key comes by

    def __call__(self, site: str, x: Tensor) -> Tensor:
        block, _, part = site.rpartition(".")
        pair = self._plan.pair_energy and part in ("q", "k")
        if part not in self._plan.moments and part not in self._plan.histograms and not pair:
            return x
        rows = self._rows(part, x)
        if part in self._plan.moments:
            shape = (*rows.shape[:-2], rows.shape[-1])
            self.moments.setdefault(site, MomentSum(shape, self._device)).add(rows)
        if part in self._plan.histograms:
            self.histograms.setdefault(site, HistogramSum(self._device)).add(rows)
        if pair:
            self._pair(block, part, rows)
        return x

    def _rows(self, part: str, x: Tensor) -> Tensor:
        """(n, D) rows of the chosen tokens, (H, n, D) per head; pixels and pooled features whole."""
        if part in ("patch", "head"):
            return x.flatten(1)
        if self._index is not None:
            x = x.index_select(-2, self._index)
        return x.transpose(0, 1).flatten(1, 2) if part in PER_HEAD else x.flatten(0, 1)

    def _pair(self, block: str, part: str, rows: Tensor) -> None:
        if part == "q":
            self._query = rows
        elif self._query is not None:
            shape = (rows.shape[0], rows.shape[-1])
            self.pairs.setdefault(block, PairEnergySum(shape, self._device)).add(self._query, rows)
            self._query = None


def observe(module: VisionTransformer, batches: Iterable[Array], plan: ObservePlan) -> Statistics:
    """Statistics of `module` over preprocessed images, in one pass that holds one batch at a time.

    Args:
        module: the network; sums are kept on its device.
        batches: float32 arrays (B, C, h, w).
        plan: which sites and how many tokens.

    Raises:
        DataError: no image, or an activation that is not finite.

    Deviations: CORP reads every token; with `plan.tokens_per_image` below T the prefix tokens weigh up to T / limit
    times more than a patch token, which is deliberate (the class token decides the prediction).
    """
    observer, images = _Observer(module, plan), 0
    with torch.inference_mode():
        for batch in batches:
            module(torch.from_numpy(batch).to(module.pos.device), observer)
            images += len(batch)
    if images == 0:
        raise DataError(
            "Calibration data must hold at least one image, got none.", hint="Point --data at a folder with images."
        )
    return Statistics(
        images,
        {site: observer.moments.pop(site).result(site) for site in list(observer.moments)},  # popped: sums are large
        {block: pairs.total for block, pairs in observer.pairs.items()},
        {site: total.result(site) for site, total in observer.histograms.items()},
    )
