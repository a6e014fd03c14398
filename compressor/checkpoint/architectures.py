"""What an architecture's name says that its tensors do not: heads, pooling, activation, and how its images are prepared.

One row per plain Vision Transformer of timm 1.0 (the default weights' preprocessing). Names that are missing either differ
in what they compute (CLIP's norm before the blocks, parallel or post-norm blocks, attention pooling) or do not exist. A test
compares every row with timm itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from compressor.errors import ConfigError
from compressor.types import MlpKind, Pool

__all__ = ["ARCHITECTURES", "HALF", "IMAGENET", "Architecture", "Pixels", "find"]

Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, 0..1 scale
HALF: Pixels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET: Pixels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP: Pixels = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
UNIT: Pixels = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Architecture:
    """Facts of one name; `pool` and the preprocessing are defaults a checkpoint's config may override."""

    heads: int
    image_size: int
    pool: Pool = "token"
    mlp: MlpKind = "gelu"
    pixels: Pixels = HALF
    crop: float = 0.9
    resize: Literal["shorter", "exact"] = "shorter"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


def find(name: str, known: Mapping[str, Architecture]) -> Architecture:
    """The facts of `name`.

    Raises:
        ConfigError: the name is not known; the nearest ones are listed.

    >>> find("deit_tiny_patch16_224", ARCHITECTURES).heads
    3
    """
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(close)}?"
        if close
        else "Examples: deit_tiny_patch16_224, vit_base_patch16_224, vit_b_16."
    )
    raise ConfigError(f"architecture must be one of the {len(known)} known names, got {name!r}.", hint=hint)


ARCHITECTURES: Mapping[str, Architecture] = {
    "deit3_base_patch16_224": Architecture(12, 224, pixels=IMAGENET),
    "deit3_base_patch16_384": Architecture(12, 384, pixels=IMAGENET, crop=1.0),
    "deit3_huge_patch14_224": Architecture(16, 224, pixels=IMAGENET),
    "deit3_large_patch16_224": Architecture(16, 224, pixels=IMAGENET),
    "deit3_large_patch16_384": Architecture(16, 384, pixels=IMAGENET, crop=1.0),
    "deit3_medium_patch16_224": Architecture(8, 224, pixels=IMAGENET),
    "deit3_small_patch16_224": Architecture(6, 224, pixels=IMAGENET),
    "deit3_small_patch16_384": Architecture(6, 384, pixels=IMAGENET, crop=1.0),
    "deit_base_distilled_patch16_224": Architecture(12, 224, pixels=IMAGENET),
    "deit_base_distilled_patch16_384": Architecture(12, 384, pixels=IMAGENET, crop=1.0),
    "deit_base_patch16_224": Architecture(12, 224, pixels=IMAGENET),
    "deit_base_patch16_384": Architecture(12, 384, pixels=IMAGENET, crop=1.0),
    "deit_small_distilled_patch16_224": Architecture(6, 224, pixels=IMAGENET),
    "deit_small_patch16_224": Architecture(6, 224, pixels=IMAGENET),
    "deit_tiny_distilled_patch16_224": Architecture(3, 224, pixels=IMAGENET),
    "deit_tiny_patch16_224": Architecture(3, 224, pixels=IMAGENET),
    "eva_large_patch14_196": Architecture(16, 196, pool="avg", pixels=CLIP, crop=1.0),
    "eva_large_patch14_336": Architecture(16, 336, pool="avg", pixels=CLIP, crop=1.0, resize="exact"),
    "flexivit_base": Architecture(12, 240, crop=0.95),
    "flexivit_large": Architecture(16, 240, crop=0.95),
    "flexivit_small": Architecture(6, 240, crop=0.95),
    "vit_base_patch8_224": Architecture(12, 224),
    "vit_base_patch14_dinov2": Architecture(12, 518, pixels=IMAGENET, crop=1.0),
    "vit_base_patch14_reg1_tipsv2": Architecture(12, 448, pixels=UNIT, crop=1.0),
    "vit_base_patch14_reg4_dinov2": Architecture(12, 518, pixels=IMAGENET, crop=1.0),
    "vit_base_patch16_224": Architecture(12, 224),
    "vit_base_patch16_224_miil": Architecture(12, 224, pixels=UNIT, crop=0.875, interpolation="bilinear"),
    "vit_base_patch16_384": Architecture(12, 384, crop=1.0),
    "vit_base_patch16_gap_224": Architecture(16, 224, pool="avg"),
    "vit_base_patch16_plus_240": Architecture(14, 240, crop=0.95),
    "vit_base_patch16_reg4_gap_256": Architecture(12, 256, pool="avg"),
    "vit_base_patch16_siglip_gap_224": Architecture(12, 224, pool="avg"),
    "vit_base_patch16_siglip_gap_256": Architecture(12, 256, pool="avg"),
    "vit_base_patch16_siglip_gap_384": Architecture(12, 384, pool="avg"),
    "vit_base_patch16_siglip_gap_512": Architecture(12, 512, pool="avg"),
    "vit_base_patch32_224": Architecture(12, 224),
    "vit_base_patch32_384": Architecture(12, 384, crop=1.0),
    "vit_base_patch32_plus_256": Architecture(14, 256, crop=0.95),
    "vit_base_patch32_siglip_gap_256": Architecture(12, 256, pool="avg", mlp="gelu_tanh"),
    "vit_betwixt_patch16_gap_256": Architecture(10, 256, pool="avg", crop=0.95),
    "vit_betwixt_patch16_reg1_gap_256": Architecture(10, 256, pool="avg", crop=0.95),
    "vit_betwixt_patch16_reg4_gap_256": Architecture(10, 256, pool="avg", crop=0.95),
    "vit_betwixt_patch16_reg4_gap_384": Architecture(10, 384, pool="avg", crop=1.0),
    "vit_giant_patch14_224": Architecture(16, 224),
    "vit_giant_patch14_dinov2": Architecture(24, 518, mlp="swiglu", pixels=IMAGENET, crop=1.0),
    "vit_giant_patch14_reg1_tipsv2": Architecture(24, 448, mlp="swiglu", pixels=UNIT, crop=1.0),
    "vit_giant_patch14_reg4_dinov2": Architecture(24, 518, mlp="swiglu", pixels=IMAGENET, crop=1.0),
    "vit_giant_patch16_gap_224": Architecture(16, 224, pool="avg", pixels=IMAGENET),
    "vit_giantopt_patch16_siglip_gap_256": Architecture(16, 256, pool="avg", mlp="gelu_tanh"),
    "vit_giantopt_patch16_siglip_gap_384": Architecture(16, 384, pool="avg", mlp="gelu_tanh"),
    "vit_gigantic_patch14_224": Architecture(16, 224),
    "vit_huge_patch14_224": Architecture(16, 224),
    "vit_huge_patch14_gap_224": Architecture(16, 224, pool="avg", pixels=IMAGENET),
    "vit_huge_patch16_gap_448": Architecture(16, 448, pool="avg", pixels=IMAGENET, crop=1.0),
    "vit_large_patch14_224": Architecture(16, 224),
    "vit_large_patch14_dinov2": Architecture(16, 518, pixels=IMAGENET, crop=1.0),
    "vit_large_patch14_reg1_tipsv2": Architecture(16, 448, pixels=UNIT, crop=1.0),
    "vit_large_patch14_reg4_dinov2": Architecture(16, 518, pixels=IMAGENET, crop=1.0),
    "vit_large_patch16_224": Architecture(16, 224),
    "vit_large_patch16_384": Architecture(16, 384, crop=1.0),
    "vit_large_patch16_siglip_gap_256": Architecture(16, 256, pool="avg"),
    "vit_large_patch16_siglip_gap_384": Architecture(16, 384, pool="avg"),
    "vit_large_patch16_siglip_gap_512": Architecture(16, 512, pool="avg", mlp="gelu_tanh"),
    "vit_large_patch32_224": Architecture(16, 224),
    "vit_large_patch32_384": Architecture(16, 384, crop=1.0),
    "vit_little_patch16_reg1_gap_256": Architecture(5, 256, pool="avg", crop=0.95),
    "vit_little_patch16_reg4_gap_256": Architecture(5, 256, pool="avg", crop=0.95),
    "vit_medium_patch16_gap_240": Architecture(8, 240, pool="avg", crop=0.95),
    "vit_medium_patch16_gap_256": Architecture(8, 256, pool="avg", crop=0.95),
    "vit_medium_patch16_gap_384": Architecture(8, 384, pool="avg", crop=0.95, resize="exact"),
    "vit_medium_patch16_reg1_gap_256": Architecture(8, 256, pool="avg", crop=0.95),
    "vit_medium_patch16_reg4_gap_256": Architecture(8, 256, pool="avg", crop=0.95),
    "vit_mediumd_patch16_reg4_gap_256": Architecture(8, 256, pool="avg", crop=0.95),
    "vit_mediumd_patch16_reg4_gap_384": Architecture(8, 384, pool="avg", crop=1.0),
    "vit_small_patch8_224": Architecture(6, 224, pixels=IMAGENET),
    "vit_small_patch14_dinov2": Architecture(6, 518, pixels=IMAGENET, crop=1.0),
    "vit_small_patch14_reg4_dinov2": Architecture(6, 518, pixels=IMAGENET, crop=1.0),
    "vit_small_patch16_36x1_224": Architecture(6, 224),
    "vit_small_patch16_224": Architecture(6, 224),
    "vit_small_patch16_384": Architecture(6, 384, crop=1.0),
    "vit_small_patch32_224": Architecture(6, 224),
    "vit_small_patch32_384": Architecture(6, 384, crop=1.0),
    "vit_so150m2_patch16_reg1_gap_256": Architecture(13, 256, pool="avg", crop=1.0),
    "vit_so150m2_patch16_reg1_gap_384": Architecture(13, 384, pool="avg", crop=1.0),
    "vit_so150m2_patch16_reg1_gap_448": Architecture(13, 448, pool="avg", crop=1.0, resize="exact"),
    "vit_so150m_patch16_reg4_gap_256": Architecture(14, 256, pool="avg", crop=0.95),
    "vit_so150m_patch16_reg4_gap_384": Architecture(14, 384, pool="avg", crop=1.0),
    "vit_so400m_patch14_reg1_tipsv2": Architecture(16, 448, pixels=UNIT, crop=1.0),
    "vit_so400m_patch14_siglip_gap_224": Architecture(16, 224, pool="avg"),
    "vit_so400m_patch14_siglip_gap_378": Architecture(16, 378, pool="avg"),
    "vit_so400m_patch14_siglip_gap_384": Architecture(16, 384, pool="avg", crop=1.0),
    "vit_so400m_patch14_siglip_gap_448": Architecture(16, 448, pool="avg", crop=1.0),
    "vit_so400m_patch14_siglip_gap_896": Architecture(16, 896, pool="avg", crop=1.0),
    "vit_so400m_patch16_siglip_gap_256": Architecture(16, 256, pool="avg", mlp="gelu_tanh"),
    "vit_so400m_patch16_siglip_gap_384": Architecture(16, 384, pool="avg", mlp="gelu_tanh"),
    "vit_so400m_patch16_siglip_gap_512": Architecture(16, 512, pool="avg", mlp="gelu_tanh"),
    "vit_tiny_patch16_224": Architecture(3, 224),
    "vit_tiny_patch16_384": Architecture(3, 384, crop=1.0),
    "vit_wee_patch16_reg1_gap_256": Architecture(4, 256, pool="avg", crop=0.95),
}
