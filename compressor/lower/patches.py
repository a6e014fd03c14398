"""Patch embeddings as convolutions: in one stride, or behind exact steps that move pixels into channels first."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compressor.lower import conv_folds as folds
from compressor.lower.graph import GraphBuilder
from compressor.types import Array, Capabilities, VitSpec

__all__ = ["columns", "cropped", "halved", "pixels_shape", "strided"]

LANES = 32  # channels that an NPU multiplies at once, whether there are as many or not
ROWS = 16  # Rockchip's compiler counts the rows of (B, h, w, in) as channels; it reshapes no other multiple on the NPU


def pixels_shape(spec: VitSpec, form: Capabilities) -> tuple[int, int, int]:
    """The graph's input behind the batch axis: (in, h, w), or (h, w, in) where `columns` reads it."""
    last = form.patch == "columns" and _reshaped(spec)
    return (*spec.image_size, spec.in_chans) if last else (spec.in_chans, *spec.image_size)


def _reshaped(spec: VitSpec) -> bool:
    return spec.grid[0] * spec.patch_size[0] % ROWS == 0


def strided(g: GraphBuilder, x: ir.Value, weight: Array) -> ir.Value:
    """(B, in, h, w) -> (B, C, rows, cols), without bias: one convolution whose stride is the kernel `weight` (C, in, p, q)."""
    size = list(weight.shape[2:])
    kernel = g.constant("patch.weight", weight.astype(np.float32))
    return g.op("patch.conv", "Conv", x, kernel, kernel_shape=size, strides=size)


def halved(g: GraphBuilder, spec: VitSpec, x: ir.Value, weight: Array, largest: int) -> ir.Value:
    """`strided` behind convolutions with stride 2 that move pixels into channels, until at most `largest` is left.

    For chips that compute a larger stride at every few pixels and throw most away; exact, see `conv_folds.unshuffle`.
    """
    depth, x = 0, cropped(g, spec, x)
    while weight.shape[2] % 2 == 0 and weight.shape[3] % 2 == 0 and min(weight.shape[2:]) > largest:
        x, weight = _unshuffled(g, f"patch.halve{depth}", x, weight, (2, 2))
        depth += 1
    return strided(g, x, weight)


def columns(g: GraphBuilder, spec: VitSpec, x: ir.Value, weight: Array, largest: int) -> ir.Value:
    """(B, h, w, in) -> (B, C, rows, cols), without bias: pixels that lie side by side in memory are read as channels.

    Where channels come last, a reshape puts n neighbours of a row into n * in of them, as many as fit in `LANES`; what a
    convolution on a few channels would waste is not computed. Rows follow by convolutions with a stride of `largest`, or 2,
    until at most `largest` are left. Exact, see `conv_folds.unshuffle`. Rows that are no multiple of `ROWS` are `halved`,
    and pixels are (B, in, h, w) then.
    """
    if not _reshaped(spec):
        return halved(g, spec, x, weight, largest)
    (rows, cols), (p, q) = spec.grid, spec.patch_size
    count = max(n for n in range(1, q + 1) if q % n == 0 and (n == 1 or n * spec.in_chans <= LANES))
    x = g.reshape("patch.columns", cropped(g, spec, x, (1, 2)), (rows * p, cols * q // count, count * spec.in_chans))
    x = g.op("patch.channels", "Transpose", x, perm=(0, 3, 1, 2))
    depth, weight = 0, folds.unshuffle(weight, 1, count)
    while weight.shape[2] > largest and (step := _row_step(weight.shape[2], largest)):
        x, weight = _unshuffled(g, f"patch.rows{depth}", x, weight, (step, 1))
        depth += 1
    return strided(g, x, weight)


def _row_step(rows: int, largest: int) -> int:
    """`largest`, or 2, whichever divides `rows` first; 0 where neither does. A step of 1 would lead nowhere."""
    return next((n for n in (largest, 2) if n > 1 and rows % n == 0), 0)


def _unshuffled(
    g: GraphBuilder, name: str, x: ir.Value, weight: Array, size: tuple[int, int]
) -> tuple[ir.Value, Array]:
    """`conv_folds.unshuffle` of the image `x`, as a convolution, and of the kernel `weight` (C, in, p, q) that reads it."""
    kernel = g.constant(f"{name}.weight", folds.unshuffle_kernel(weight.shape[1], *size).astype(np.float32))
    return g.op(name, "Conv", x, kernel, kernel_shape=size, strides=size), folds.unshuffle(weight, *size)


def cropped(g: GraphBuilder, spec: VitSpec, x: ir.Value, axes: tuple[int, int] = (2, 3)) -> ir.Value:
    """The whole patches of an image whose rows and columns are `axes`: pixels beyond the last one are not read."""
    for axis, size, cells, patch in zip(axes, spec.image_size, spec.grid, spec.patch_size, strict=True):
        if cells * patch != size:
            x = g.slice(f"patch.crop{axis}", x, axis, 0, cells * patch)
    return x
