"""Linear layers in the form a runtime executes fast: float, QDQ pairs around float operators, or integer operators.

Only linear layers are quantized. Each input site is quantized once however many linears read it, weights are stored as
integers, biases stay float. The arithmetic of every form is the same up to float rounding:

    y = sx * sw * sum (qx - zx) qw + b,   qx = clip(round(x / sx) + zx),   qw = clip(round(w / sw)),   half to even

``linear_inputs``  QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(weight)) -> Add: the common form
                   of runtimes that fuse QDQ. Symmetric int8 activations, int8 weights per output channel, no bias QDQ.
``integer_ops``    QuantizeLinear -> com.microsoft MatMulIntegerToFloat: ONNX Runtime's own int8 operator, so that no
                   optimizer has to recognize anything. Activations are stored as uint8 with the zero point moved by
                   128, because ONNX Runtime's x86 kernels multiply unsigned by signed; the real values are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compressor.errors import ConfigError
from compressor.lower.graph import CONTRIB, GraphBuilder
from compressor.types import Capabilities, QParams, Quantization

__all__ = ["Linears", "weight_integers"]

Array = NDArray[Any]
STORAGE = {8: np.int8, 16: np.int16}


def weight_integers(weight: Array, params: QParams) -> Array:
    """int8 integers, of `weight`'s shape, nearest to ``weight / scale`` on the grid; `params.axis` is the axis kept.

    >>> weight_integers(np.array([[0.5, -3.0]], np.float32), QParams(np.array([0.5], np.float32), 0, 8, axis=0))
    array([[ 1, -6]], dtype=int8)
    """
    scale = np.asarray(params.scale, dtype=np.float32)
    if params.axis is not None:
        scale = scale.reshape([-1 if axis == params.axis else 1 for axis in range(weight.ndim)])
    return np.clip(np.rint(weight / scale), params.qmin, params.qmax).astype(np.int8)


class Linears:
    """Emits the linear layers of one graph, quantized where the plan has both the weight's and the input site's grid.

    Args:
        graph: receives the nodes.
        weights: the model's float32 weights by name.
        capabilities: which quantized form the target executes fast.
        quantization: the plan; None emits float.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        weights: Mapping[str, Array],
        capabilities: Capabilities,
        quantization: Quantization | None,
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._style = capabilities.qdq
        self._plan = quantization or Quantization({}, {})
        if quantization is not None and self._style not in ("linear_inputs", "integer_ops"):
            raise ConfigError(
                f"Capabilities.qdq of a quantized graph must be linear_inputs or integer_ops, got {self._style!r}."
            )

    def quantized(self, site: str, *names: str) -> bool:
        """Whether the linears `names`, all reading `site`, are executed in integers."""
        listed = {n for n in names if f"{n}.weight" in self._plan.weights and site in self._plan.activations}
        if listed and listed != set(names):
            raise ConfigError(
                f"Linears {', '.join(names)} read one grid: all or none must be quantized, got {sorted(listed)}."
            )
        return bool(listed)

    def input(self, site: str, x: ir.Value, *names: str) -> ir.Value:
        """`x` as the linears `names` read it: quantized where they are. Call once, pass the result to each `matmul`."""
        if not self.quantized(site, *names):
            return x
        g, params = self._graph, self._plan.activations[site]
        if params.axis is not None:
            raise ConfigError(f"Activation grid of {site!r} must be per tensor, got axis {params.axis}.")
        if params.bits < 8:  # narrower than its storage: saturate explicitly
            low, high = ((q - params.zero_point) * float(params.scale) for q in (params.qmin, params.qmax))
            x = g.op(f"{x.name}.clip", "Clip", x, g.floats(f"{site}.low", low), g.floats(f"{site}.high", high))
        grid = self._grid(site, params)
        integers = g.op(f"{x.name}.quantize", "QuantizeLinear", x, *grid)
        return (
            integers
            if self._style == "integer_ops"
            else g.op(f"{x.name}.dequantize", "DequantizeLinear", integers, *grid)
        )

    def matmul(self, name: str, site: str, x: ir.Value, parts: tuple[str, ...], bias: Array | None) -> ir.Value:
        """``x @ W^T + bias`` (B, T, out): the linears `parts`, side by side in one product; `x` comes from `input`."""
        emit = (
            self._float
            if not self.quantized(site, *parts)
            else self._integer
            if self._style == "integer_ops"
            else self._qdq
        )
        return emit(name, site, x, parts, bias if bias is not None and bias.any() else None)

    def conv(self, name: str, site: str, x: ir.Value) -> ir.Value:
        """The patch embedding, without bias, as a strided convolution: (B, in, h, w) -> (B, C, rows, cols)."""
        g, weight = self._graph, self._weights[f"{name}.weight"]
        if self.quantized(site, name):
            if self._style == "integer_ops":
                raise ConfigError("Capabilities.patch of a graph with integer_ops must be 'unshuffle', got 'conv'.")
            kernel = self._dequantized(
                name, weight_integers(weight, self._plan.weights[f"{name}.weight"]), (name,), axis=0
            )
        else:
            kernel = g.constant(f"{name}.weight", weight)
        size = list(weight.shape[2:])
        return g.op(f"{name}.conv", "Conv", x, kernel, kernel_shape=size, strides=size)

    def _float(self, name: str, site: str, x: ir.Value, parts: tuple[str, ...], bias: Array | None) -> ir.Value:
        del site  # Unused
        g = self._graph
        weight = np.concatenate([self._matrix(part) for part in parts]).T
        return self._add(name, g.op(f"{name}.matmul", "MatMul", x, g.constant(f"{name}.weight", weight)), bias)

    def _qdq(self, name: str, site: str, x: ir.Value, parts: tuple[str, ...], bias: Array | None) -> ir.Value:
        del site  # Unused
        weight = self._dequantized(name, self._integers(parts), parts, axis=1)
        return self._add(name, self._graph.op(f"{name}.matmul", "MatMul", x, weight), bias)

    def _integer(self, name: str, site: str, x: ir.Value, parts: tuple[str, ...], bias: Array | None) -> ir.Value:
        g = self._graph
        scale, zero = self._grid(site, self._plan.activations[site])
        weight = g.constant(f"{name}.weight", self._integers(parts))
        weight_scale = g.constant(f"{name}.weight.scale", self._scales(parts))
        inputs: list[ir.Value | None] = [x, weight, scale, weight_scale, zero]
        if bias is not None:
            inputs += [None, g.constant(f"{name}.bias", bias)]  # no zero points of weights: they are symmetric
        return g.op(f"{name}.matmul", "MatMulIntegerToFloat", *inputs, domain=CONTRIB)

    def _add(self, name: str, x: ir.Value, bias: Array | None) -> ir.Value:
        if bias is None:
            return x
        return self._graph.op(f"{name}.add", "Add", x, self._graph.constant(f"{name}.bias", bias))

    def _grid(self, site: str, params: QParams) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of an activation site; its dtype is that of the stored integers."""
        zero = np.asarray(params.zero_point, dtype=STORAGE[16 if params.bits > 8 else 8])
        if self._style == "integer_ops":
            zero = np.asarray(params.zero_point + 128, dtype=np.uint8)
        scale = np.asarray(params.scale, dtype=np.float32)
        return self._graph.constant(f"{site}.scale", scale), self._graph.constant(f"{site}.zero", zero)

    def _dequantized(self, name: str, integers: Array, parts: tuple[str, ...], axis: int) -> ir.Value:
        g = self._graph
        weight = g.constant(f"{name}.weight", integers)
        scale = g.constant(f"{name}.weight.scale", self._scales(parts))
        zero = g.constant(f"{name}.weight.zero", np.zeros_like(self._scales(parts), dtype=np.int8))
        return g.op(f"{name}.weight.dequantize", "DequantizeLinear", weight, scale, zero, axis=axis)

    def _matrix(self, part: str) -> Array:
        weight = self._weights[f"{part}.weight"]
        return weight.reshape(len(weight), -1)  # the patch kernel (C, in, p, p) is a matrix too

    def _integers(self, parts: tuple[str, ...]) -> Array:
        """(in, out) int8."""
        rows = [weight_integers(self._matrix(p), self._plan.weights[f"{p}.weight"]) for p in parts]
        return np.concatenate(rows).T

    def _scales(self, parts: tuple[str, ...]) -> Array:
        """(out,) float32; a weight with one scale for the whole tensor repeats it."""
        params = [self._plan.weights[f"{p}.weight"] for p in parts]
        widths = [len(self._weights[f"{p}.weight"]) for p in parts]
        return np.concatenate(
            [np.broadcast_to(np.float32(q.scale).reshape(-1), n) for q, n in zip(params, widths, strict=True)]
        )
