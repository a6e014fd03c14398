"""Patch embeddings as convolutions: in one stride, or as exact halvings of the image before a smaller one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.lower import conv_folds as folds
from compressor.lower.graph import GraphBuilder
from compressor.types import Array, VitSpec

__all__ = ["cropped", "halved", "strided"]


def strided(g: GraphBuilder, x: ir.Value, weight: Array) -> ir.Value:
    """(B, in, h, w) -> (B, C, rows, cols), without bias: one convolution whose stride is the kernel `weight` (C, in, p, q)."""
    size = list(weight.shape[2:])
    kernel = g.constant("patch.weight", weight.astype(np.float32))
    return g.op("patch.conv", "Conv", x, kernel, kernel_shape=size, strides=size)


def halved(g: GraphBuilder, spec: VitSpec, x: ir.Value, weight: Array, largest: int) -> ir.Value:
    """`strided` behind convolutions with stride 2 that move pixels into channels, until at most `largest` is left.

    For chips that compute a larger stride at every few pixels and throw most away; exact, see `conv_folds.halve`.
    """
    depth, x = 0, cropped(g, spec, x)
    while weight.shape[2] % 2 == 0 and weight.shape[3] % 2 == 0 and min(weight.shape[2:]) > largest:
        kernel = folds.halving_kernel(spec.in_chans * 4**depth)
        constant = g.constant(f"patch.halve{depth}.weight", kernel.astype(np.float32))
        x = g.op(f"patch.halve{depth}", "Conv", x, constant, kernel_shape=(2, 2), strides=(2, 2))
        weight, depth = folds.halve(weight), depth + 1
    return strided(g, x, weight)


def cropped(g: GraphBuilder, spec: VitSpec, x: ir.Value) -> ir.Value:
    """The whole patches of (B, in, h, w): pixels beyond the last one are not read."""
    for axis, size, cells, patch in zip((2, 3), spec.image_size, spec.grid, spec.patch_size, strict=True):
        if cells * patch != size:
            x = g.slice(f"patch.crop{axis}", x, axis, 0, cells * patch)
    return x
