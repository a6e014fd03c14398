"""What pruning really did: the branches of the dense and the compressed network, side by side on the same images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from compressor.types import Array
from compressor.vit import VisionTransformer

__all__ = ["branch_errors"]

BRANCHES = ("attn", "mlp")


def branch_errors(dense: VisionTransformer, small: VisionTransformer, batches: Iterable[Array]) -> dict[str, float]:
    """Relative squared error of every branch's output, by site ("blocks.0.attn", "blocks.0.mlp", ...).

    Each network runs on its own stream, so an error includes what the compressed blocks before it passed on.

    Args:
        dense: the reference.
        small: a network of as many blocks.
        batches: float32 (B, C, h, w); one batch of activations is held.
    """
    change: dict[str, float] = defaultdict(float)
    energy: dict[str, float] = defaultdict(float)
    with torch.inference_mode():
        for batch in batches:
            pixels = torch.from_numpy(batch).to(dense.pos.device)
            expected, got = _branches(dense, pixels), _branches(small, pixels)
            for site, y in expected.items():
                change[site] += (got[site] - y).double().square().sum().item()
                energy[site] += y.double().square().sum().item()
    return {site: change[site] / max(energy[site], 1e-300) for site in energy}


def _branches(module: VisionTransformer, pixels: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def tap(site: str, x: Tensor) -> Tensor:
        if site.rpartition(".")[2] in BRANCHES:
            seen[site] = x
        return x

    module(pixels, tap)
    return seen
