"""What pruning really did: the dense and the compressed token stream, side by side on the same images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from compressor.types import Array
from compressor.vit import VisionTransformer

__all__ = ["stream_errors"]

BRANCHES = ("attn", "mlp")


def stream_errors(dense: VisionTransformer, small: VisionTransformer, batches: Iterable[Array]) -> dict[str, float]:
    """Relative squared distance of the token streams behind every branch, by its site ("blocks.0.attn", ...).

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
            expected, got = _streams(dense, pixels), _streams(small, pixels)
            for site, x in expected.items():
                change[site] += (got[site] - x).double().square().sum().item()
                energy[site] += x.double().square().sum().item()
    return {site: change[site] / max(energy[site], 1e-300) for site in energy}


def _streams(module: VisionTransformer, pixels: Tensor) -> dict[str, Tensor]:
    """The token stream behind every branch."""
    seen: dict[str, Tensor] = {}
    stream = pixels

    def tap(site: str, x: Tensor) -> Tensor:
        nonlocal stream
        parent, _, part = site.rpartition(".")
        if parent == "blocks":
            stream = x
        elif part in BRANCHES:
            stream = stream + x
            seen[site] = stream
        return x

    module(pixels, tap)
    return seen
