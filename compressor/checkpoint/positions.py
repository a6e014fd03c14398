"""Position embeddings: which tokens they cover, and their resampling to another grid."""

from __future__ import annotations

import math
from typing import Literal

from compressor.errors import ConfigError
from compressor.types import Array

__all__ = ["Grid", "Resampling", "find_grid", "resample"]

Grid = tuple[int, int]
Resampling = Literal["antialias", "plain", "corners"]
MAX_PATCHES = 65536  # attention over more does not fit any device


def find_grid(length: int, prefix: int, grid: Grid | None) -> Grid | None:
    """The grid of patches that `length` positions describe: `grid` itself, or a square when it is None; None when neither fits.

    Positions cover the patches and none (DeiT-III), one (DINOv2 with registers) or all of the `prefix` tokens.

    >>> find_grid(197, 1, None), find_grid(196, 1, None), find_grid(25, 2, (4, 6)), find_grid(7, 1, None)
    ((14, 14), (14, 14), (4, 6), None)
    """
    for covered in sorted({prefix, min(prefix, 1), 0}, reverse=True):
        patches = length - covered
        side = math.isqrt(max(patches, 0))
        found = grid if grid is not None else (side, side)
        if patches > 0 and found[0] * found[1] == patches:
            return found
    return None


def resample(pos: Array, old: Grid, new: Grid, resampling: Resampling) -> Array:
    """`pos` (old patches, C) float32 as (new patches, C), by bicubic interpolation; itself when the grids are equal.

    `resampling` as the family does it: ``antialias`` timm and DINOv2 with registers; ``plain`` ViT, DeiT and DINOv2 of
    transformers; ``corners`` torchvision, which aligns the corner patches.

    Raises:
        ConfigError: the new grid is larger than any device could attend to.

    Source: Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.2 (2-D interpolation by location in the image).
    """
    if new[0] * new[1] > MAX_PATCHES:
        raise ConfigError(f"image_size must give at most {MAX_PATCHES} patches, got {new[0]} x {new[1]}.")
    if old == new:
        return pos
    import torch
    from torch.nn import functional as F

    image = torch.from_numpy(pos).T.reshape(1, -1, *old)  # (1, C, rows, columns)
    resized = F.interpolate(
        image, size=new, mode="bicubic", align_corners=resampling == "corners", antialias=resampling == "antialias"
    )
    array: Array = resized.flatten(2)[0].T.contiguous().numpy()
    return array
