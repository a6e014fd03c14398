"""Linear layers in the form a runtime executes fast: float, QDQ pairs around float operators, or integer operators.

Linear layers are quantized, and q k^T where the plan has grids for q and k. Each input site is quantized once however many
linears read it, weights are stored as integers, biases stay float. The arithmetic of every form is the same up to float
rounding:

    y = sx * sw * sum (qx - zx) qw + b,   qx = clip(round(x / sx) + zx),   qw = clip(round(w / sw)),   half to even

``linear_inputs``  QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(weight)) -> Add: the common form
                   of runtimes that fuse QDQ. int8 activations, with a zero point where the plan has one (OpenVINO's
                   before fc2 and the patch embedding), int8 weights per output channel, no bias QDQ; or both as 8-bit
                   floats (FLOAT8E4M3FN).
``integer_ops``    QuantizeLinear -> com.microsoft MatMulIntegerToFloat: ONNX Runtime's own int8 operator, so that no
                   optimizer has to recognize anything. Activations are stored as uint8 with the zero point moved by
                   128, because ONNX Runtime's x86 kernels multiply unsigned by signed; the real values are the same.

A weight on a grid whose input has none is stored as int8 or int4 and multiplied in float, in either style: MatMul of
DequantizeLinear(weight), whose scales are per output channel or, in blocks, per group of inputs. A last shorter group is
filled with zeros, which are sliced off again: not every runtime reads a broken block.

On x86 without VNNI instructions (before 2019) int8 kernels add pairs of products in 16 bits, which saturate: OpenVINO
limited to AVX-512 without VNNI missed a test model by 0.35 instead of 0.04. The golden outputs of a bundle show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compressor.errors import ConfigError
from compressor.lower.graph import CONTRIB, GraphBuilder
from compressor.types import Capabilities, QParams, Quantization, Width, largest

__all__ = ["Linears", "columns", "opset", "storage", "weight_integers"]

Array = NDArray[Any]
FLOAT8 = ir.DataType.FLOAT8E4M3FN.numpy()
NARROW = ir.DataType.INT4.numpy()  # two in a byte of the file
NARROW_OPSET = 21  # of 4-bit integers and of scales in blocks
STRIP = 16  # rows: a cache line of float32 in the transposed matrix


def weight_integers(weight: Array, params: QParams) -> Array:
    """int8 or float8 numbers, of `weight`'s shape, nearest to ``weight / scale`` on the grid; `params.axis` is the axis kept.

    >>> weight_integers(np.array([[0.5, -3.0]], np.float32), QParams(np.array([0.5], np.float32), 0, 8, axis=0))
    array([[ 1, -6]], dtype=int8)
    """
    scale = np.asarray(params.scale, dtype=np.float32)
    if params.group is not None:
        scale = np.repeat(scale, params.group, axis=1)[:, : weight[0].size].reshape(weight.shape)
    elif params.axis is not None:
        scale = scale.reshape([-1 if axis == params.axis else 1 for axis in range(weight.ndim)])
    if isinstance(params.bits, str):
        return np.clip(weight / scale, params.qmin, params.qmax).astype(FLOAT8)
    return np.clip(np.rint(weight / scale), params.qmin, params.qmax).astype(np.int8)


def storage(width: Width) -> np.dtype[Any]:
    """The type that holds the numbers of an activation grid, or of a symmetric weight grid without groups.

    >>> storage(4), storage(16)
    (dtype('int8'), dtype('int16'))
    """
    if isinstance(width, str):
        return np.dtype(FLOAT8)
    return np.dtype(np.int8 if width <= 8 else np.int16)


def opset(capabilities: Capabilities, quantization: Quantization | None) -> int:
    """The target's; of a plan with groups, at least the first that has them.

    >>> opset(Capabilities("tokens", 20, ("fp32",)), None)
    20
    """
    grouped = quantization is not None and any(q.group is not None for q in quantization.weights.values())
    return max(capabilities.opset, NARROW_OPSET) if grouped else capabilities.opset


def columns(matrices: Sequence[Array]) -> Array:
    """(in, out) of all `matrices` (out, in), transposed and side by side; in strips, three times faster than at once.

    >>> columns([np.array([[1, 2], [3, 4]]), np.array([[5, 6]])])
    array([[1, 3, 5],
           [2, 4, 6]])
    """
    whole = np.empty((matrices[0].shape[1], sum(len(m) for m in matrices)), matrices[0].dtype)
    start = 0
    for matrix in matrices:
        for row in range(0, len(matrix), STRIP):
            strip = matrix[row : row + STRIP]
            whole[:, start + row : start + row + len(strip)] = strip.T
        start += len(matrix)
    return whole


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
        if self._plan.precision == "fp8" and self._style != "linear_inputs":
            raise ConfigError(
                f"Capabilities.qdq of a graph with 8-bit floats must be linear_inputs, got {self._style!r}."
            )
        scores = [site for site in self._plan.activations if site.endswith((".q", ".k"))]
        if scores and not capabilities.int8_scores:
            raise ConfigError(
                f"Capabilities.int8_scores of a graph with a grid for {scores[0]!r} must be true, got false."
            )
        if scores and capabilities.attention == "fused":
            raise ConfigError(
                f"Capabilities.attention of a graph with a grid for {scores[0]!r} must be matmul, got 'fused'."
            )

    def quantized(self, site: str, *names: str) -> bool:
        """Whether the linears `names`, all reading `site`, are executed in integers."""
        return site in self._plan.activations and self.stored(*names)

    def stored(self, *names: str) -> bool:
        """Whether the weights of the linears `names` are stored as integers."""
        listed = {n for n in names if f"{n}.weight" in self._plan.weights}
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
        if isinstance(params.bits, int) and params.bits < 8:  # narrower than its storage: saturate explicitly
            low, high = ((q - params.zero_point) * float(params.scale) for q in (params.qmin, params.qmax))
            x = g.op(f"{x.name}.clip", "Clip", x, g.floats(f"{site}.low", low), g.floats(f"{site}.high", high))
        grid = self._grid(site, params)
        integers = g.op(f"{x.name}.quantize", "QuantizeLinear", x, *grid)
        if self._style == "integer_ops":
            return integers
        return g.op(f"{x.name}.dequantize", "DequantizeLinear", integers, *grid)

    def rounds(self, site: str) -> bool:
        """Whether `site` has a grid."""
        return site in self._plan.activations

    def rounded(self, site: str, x: ir.Value) -> ir.Value:
        """`x`, which no linear reads, on the grid of `site`; itself where that has none."""
        if not self.rounds(site):
            return x
        grid = self._grid(site, self._plan.activations[site])
        integers = self._graph.op(f"{site}.quantize", "QuantizeLinear", x, *grid)
        return self._graph.op(f"{site}.dequantize", "DequantizeLinear", integers, *grid)

    def matmul(self, name: str, site: str, x: ir.Value, parts: tuple[str, ...], bias: Array | None) -> ir.Value:
        """``x @ W^T + bias`` (B, T, out): the linears `parts`, side by side in one product; `x` comes from `input`."""
        g = self._graph
        offset = g.constant(f"{name}.bias", bias) if bias is not None and bias.any() else None
        quantized = self.quantized(site, *parts)
        if quantized and self._style == "integer_ops":
            return self._integer_matmul(name, site, x, parts, offset)
        if quantized:
            weight = self._dequantized(name, parts)
        elif self.stored(*parts):
            weight = self._unpacked(name, parts)
        else:
            weight = self._matrix(name, parts, self._rows, np.dtype(np.float32))
        y = g.op(f"{name}.matmul", "MatMul", x, weight)
        return y if offset is None else g.op(f"{name}.add", "Add", y, offset)

    def conv(self, name: str, site: str, x: ir.Value) -> ir.Value:
        """The patch embedding, without bias, as a strided convolution: (B, in, h, w) -> (B, C, rows, cols)."""
        g, weight = self._graph, self._weights[f"{name}.weight"]
        if not self.stored(name):
            kernel = g.constant(f"{name}.weight", weight)
        elif self._plan.weights[f"{name}.weight"].group is not None:
            raise ConfigError("Capabilities.patch of a graph with grouped weights must be 'unshuffle', got 'conv'.")
        elif self._style == "linear_inputs":
            integers = g.constant(f"{name}.weight", weight_integers(weight, self._plan.weights[f"{name}.weight"]))
            kernel = self._dequantize(name, integers, (name,), axis=0)
        else:
            raise ConfigError("Capabilities.patch of a graph with integer_ops must be 'unshuffle', got 'conv'.")
        size = weight.shape[2:]
        return g.op(f"{name}.conv", "Conv", x, kernel, kernel_shape=size, strides=size)

    def _integer_matmul(
        self, name: str, site: str, x: ir.Value, parts: tuple[str, ...], bias: ir.Value | None
    ) -> ir.Value:
        g = self._graph
        scale, zero = self._grid(site, self._plan.activations[site])
        weight = self._matrix(name, parts, self._integers, np.dtype(np.int8))
        inputs = [x, weight, scale, g.constant(f"{name}.weight.scale", self._scales(parts)), zero]
        biased = [] if bias is None else [None, bias]  # None: no zero points of weights, they are symmetric
        return g.op(f"{name}.matmul", "MatMulIntegerToFloat", *inputs, *biased, domain=CONTRIB)

    def _dequantized(self, name: str, parts: tuple[str, ...]) -> ir.Value:
        dtype = storage(self._plan.weights[f"{parts[0]}.weight"].bits)
        return self._dequantize(name, self._matrix(name, parts, self._integers, dtype), parts, axis=1)

    def _unpacked(self, name: str, parts: tuple[str, ...]) -> ir.Value:
        """The float matrix (in, out) of the linears `parts`, from the fewest bytes that hold its integers."""
        g, params, node = self._graph, self._plan.weights[f"{parts[0]}.weight"], f"{name}.weight.dequantize"
        if params.group is None:
            integers = self._matrix(name, parts, self._integers, np.dtype(np.int8))
            return g.op(
                node, "DequantizeLinear", integers, g.constant(f"{name}.weight.scale", self._scales(parts)), axis=1
            )
        dtype = NARROW if largest(params.bits) <= 7 else np.dtype(np.int8)
        integers = self._matrix(name, parts, self._integers, dtype, params.group)
        scales = [self._plan.weights[f"{part}.weight"].scale for part in parts]
        scale = g.constant(f"{name}.weight.scale", np.concatenate(scales).T.astype(np.float32))
        weight = g.op(node, "DequantizeLinear", integers, scale, axis=0, block_size=params.group)
        width = self._rows(parts[0]).shape[1]
        return g.slice(f"{name}.weight.cut", weight, 0, 0, width) if width % params.group else weight

    def _dequantize(self, name: str, integers: ir.Value, parts: tuple[str, ...], axis: int) -> ir.Value:
        g, scales = self._graph, self._scales(parts)
        assert integers.dtype is not None
        zero = g.constant(f"{name}.weight.zero", np.zeros(scales.shape, dtype=integers.dtype.numpy()))
        scale = g.constant(f"{name}.weight.scale", scales)
        return g.op(f"{name}.weight.dequantize", "DequantizeLinear", integers, scale, zero, axis=axis)

    def _grid(self, site: str, params: QParams) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of an activation site; its dtype is that of the stored integers."""
        zero = np.asarray(params.zero_point, dtype=storage(params.bits))
        if self._style == "integer_ops":
            zero = np.asarray(params.zero_point + 128, dtype=np.uint8)
        scale = np.asarray(params.scale, dtype=np.float32)
        return self._graph.constant(f"{site}.scale", scale), self._graph.constant(f"{site}.zero", zero)

    def _matrix(
        self,
        name: str,
        parts: tuple[str, ...],
        rows: Callable[[str], Array],
        dtype: np.dtype[Any],
        group: int = 1,
    ) -> ir.Value:
        """The constant (in, out) of the linears `parts`, whose `rows` are (out, in) each; zeros below fill a last group."""
        shapes = [self._rows(part).shape for part in parts]
        missing = -shapes[0][1] % group
        shape = (shapes[0][1] + missing, sum(out for out, _ in shapes))

        def make() -> Array:
            whole = columns([rows(part) for part in parts])
            return np.pad(whole, ((0, missing), (0, 0))).astype(dtype) if group > 1 else whole

        return self._graph.deferred(f"{name}.weight", shape, dtype, make)

    def _rows(self, part: str) -> Array:
        weight = self._weights[f"{part}.weight"]
        return weight.reshape(len(weight), -1)  # the patch kernel (C, in, p, p) is a matrix too

    def _integers(self, part: str) -> Array:
        return weight_integers(self._rows(part), self._plan.weights[f"{part}.weight"])

    def _scales(self, parts: tuple[str, ...]) -> Array:
        """(out,) float32; a weight with one scale for the whole tensor repeats it."""
        scales = []
        for part in parts:
            params = self._plan.weights[f"{part}.weight"]
            if params.axis not in (None, 0):
                raise ConfigError(
                    f"Weight grid of {part!r} must be per tensor or output channel, got axis {params.axis}."
                )
            scales.append(np.broadcast_to(np.float32(params.scale).reshape(-1), len(self._rows(part))))
        return np.concatenate(scales)
