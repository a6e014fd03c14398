"""Grids of integers or 8-bit floats: from numbers to the grid and back, as ONNX QuantizeLinear and DequantizeLinear do it.

All arithmetic is float32 with a true division and round-half-even, which is what the runtimes compute; multiplying by a
reciprocal, as several libraries do, moves values that lie on a rounding boundary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compressor.errors import ConfigError
from compressor.types import Array, QParams, Width, largest

__all__ = ["affine", "dequantize", "fake_quant", "fake_quant_torch", "per_channel", "quantize", "rounded", "symmetric"]

SMALLEST_SCALE = 2.0**-100  # float32-normal with room for scale products; a tensor of zeros gets scale 1 instead


def symmetric(amax: Array | float, bits: Width, axis: int | None = None, group: int | None = None) -> QParams:
    """The symmetric grid whose largest number represents `amax`; zeros get scale 1.

    >>> symmetric(12.7, 8).scale
    array(0.1, dtype=float32)
    """
    amax = np.asarray(amax, dtype=np.float64)
    if not (np.isfinite(amax).all() and (amax >= 0).all()):
        raise ConfigError(f"quantize: amax must be finite and not negative, got {amax}.")
    scale = np.where(amax > 0, np.maximum(amax / largest(bits), SMALLEST_SCALE), 1.0)
    return QParams(scale.astype(np.float32), 0, bits, axis, group)


def affine(low: float, high: float, bits: int) -> QParams:
    """The grid whose integers span `low` .. `high`, both widened to include zero, which is represented exactly.

    >>> affine(-0.17, 2.38, 8).zero_point
    -111
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        return symmetric(0.0, bits)
    scale = np.float32(max((high - low) / (2**bits - 1), SMALLEST_SCALE))
    zero_point = -(2 ** (bits - 1)) - round(low / float(scale))
    return QParams(np.asarray(scale), zero_point, bits)


def per_channel(q: QParams, shape: Sequence[int]) -> Array:
    """The scale, shaped to broadcast against a tensor of `shape`; groups run along its flattened last axes.

    >>> per_channel(symmetric(np.ones(5), 8, axis=0), (5, 3, 2, 2)).shape
    (5, 1, 1, 1)
    >>> per_channel(symmetric(np.array([[1.0, 2.0]]) * 127, 8, axis=0, group=2), (1, 3))
    array([[1., 1., 2.]], dtype=float32)
    """
    if q.axis is None:
        return q.scale
    if q.group is not None:
        return np.repeat(q.scale, q.group, axis=1)[:, : math.prod(shape[1:])].reshape(shape)
    return q.scale.reshape([-1 if i == q.axis else 1 for i in range(len(shape))])


def rounded(u: Tensor) -> Tensor:
    """The 8-bit floats (e4m3) nearest to `u`, half to even and never beyond the largest, in the type of `u`.

    >>> rounded(torch.tensor([0.3, -17.0, 1e4])).tolist()
    [0.3125, -16.0, 448.0]
    """
    return u.clamp(-largest("e4m3"), largest("e4m3")).to(torch.float8_e4m3fn).to(u.dtype)


def quantize(x: Array, q: QParams) -> Array:
    """Numbers of the grid for `x`, same shape: int32, or float32 that are 8-bit floats."""
    x = np.asarray(x, dtype=np.float32)
    if isinstance(q.bits, str):
        return np.asarray(rounded(torch.from_numpy(x / per_channel(q, x.shape))))
    integers = np.rint(x / per_channel(q, x.shape)) + np.float32(q.zero_point)
    return np.clip(integers, q.qmin, q.qmax).astype(np.int32)


def dequantize(integers: Array, q: QParams) -> Array:
    """float32 values of the grid's numbers, same shape."""
    return (integers - q.zero_point).astype(np.float32) * per_channel(q, integers.shape)


def fake_quant(x: Array, q: QParams) -> Array:
    """The nearest values of the grid to `x`, same shape, float32."""
    return dequantize(quantize(x, q), q)


def fake_quant_torch(x: Tensor, q: QParams) -> Tensor:
    """The same as `fake_quant` on a float32 tensor, bit for bit."""
    scale = torch.from_numpy(np.asarray(per_channel(q, x.shape), dtype=np.float32)).to(x.device)
    if isinstance(q.bits, str):
        return rounded(x / scale) * scale
    centred = torch.clamp(torch.round(x / scale), q.qmin - q.zero_point, q.qmax - q.zero_point)
    return centred * scale
