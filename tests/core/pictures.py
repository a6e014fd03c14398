"""Pictures for the tests of the image readers."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from calibration.data import ImageSet

__all__ = ["indexed_set", "memory", "picture", "save"]


@contextmanager
def memory() -> Iterator[list[float]]:
    """A list that holds the peak of traced bytes after the block."""
    peak: list[float] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def picture(seed: int = 0, height: int = 20, width: int = 24, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(zlib.crc32(path.name.encode()))).save(path, **options)
    return path


def indexed_set(labels: list[int] | None, count: int | None = None) -> ImageSet:
    n = len(labels) if labels is not None else count
    items = tuple(np.full((2, 2, 1), i % 256, np.uint8) for i in range(n))
    return ImageSet("made", tuple(str(i) for i in range(n)), items, None if labels is None else np.array(labels))
