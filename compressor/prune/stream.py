"""The token stream of every calibration image, so that blocks can be compressed one after another and nothing is run
twice.

Two such streams (dense and compressed) are all that the sequential pass holds beside one block's sums. Beyond a limit
they live in unnamed temporary files, which the system removes even when the process is killed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["TokenStream"]

LIMIT_BYTES = 2 << 30


class TokenStream:
    """Batches of tokens (B, T, C) float32, in memory up to `limit_bytes` and in temporary files beyond.

    Args:
        device: where batches are put when they are read.
        limit_bytes: how much may stay in memory.
    """

    def __init__(self, device: torch.device, limit_bytes: int = LIMIT_BYTES) -> None:
        self._device, self._free = device, limit_bytes
        self._chunks: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._chunks)

    def append(self, tokens: Tensor) -> None:
        """Add one batch."""
        size = tokens.numel() * 4
        if size <= self._free:
            self._free -= size
            self._chunks.append(tokens.to("cpu", torch.float32, copy=True))
            return
        with tempfile.TemporaryFile() as file:  # the mapping outlives the closed file
            mapped = np.memmap(file, np.float32, "w+", shape=tuple(tokens.shape))
        self._chunks.append(torch.from_numpy(mapped))
        self[len(self) - 1] = tokens

    def mapped(self, change: Callable[[Tensor], Tensor]) -> TokenStream:
        """A new stream of changed batches, with the memory limit that is still free."""
        other = TokenStream(self._device, self._free)
        for tokens in self:
            other.append(change(tokens))
        return other

    def copy(self) -> TokenStream:
        """An independent stream of the same tokens."""
        return self.mapped(lambda tokens: tokens)

    def first(self, images: int) -> TokenStream:
        """An independent stream of the first images."""
        other = TokenStream(self._device, self._free)
        for tokens in self:
            if images > 0:
                other.append(tokens[:images])
                images -= len(tokens)
        return other

    def __getitem__(self, index: int) -> Tensor:
        return self._chunks[index].to(self._device)

    def __setitem__(self, index: int, tokens: Tensor) -> None:
        self._chunks[index].copy_(tokens)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))
