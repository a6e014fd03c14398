"""Our own ranges for a compiler that quantizes by itself.

A vendor's calibration takes the extreme of every tensor. Ours takes, for each, the threshold inside it whose grid has the least
mean squared error on the same images: few values lie near the extreme, and every other one gets finer steps. A tensor that an
Exp reads ends where the exponential is zero on its own grid.

Source: the search over shrunken ranges is that of Migacz, "8-bit inference with TensorRT" (GTC 2017), with squared error in
place of divergence.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.types import Array

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Histogram", "Seen", "attained", "observe", "thresholds", "with_grids"]

BINS = 2048
LEVELS = 127  # of a symmetric int8 grid, on either side of zero
SHARES = np.linspace(1.0, 0.2, 41)  # of the largest magnitude that a grid may reach
MOVES = ("Reshape", "Transpose", "Pad", "Slice", "MaxPool")  # their outputs are on the grid of their input
VANISHES = math.log(4 * LEVELS)  # exp(-x) is a quarter of a step of the grid of 0 to 1, so nothing behind it matters


@dataclass(frozen=True)
class Histogram:
    """The magnitudes of one tensor over all images, in equal cells from 0 to `largest`."""

    largest: float
    counts: Array  # (BINS,) int64

    def threshold(self) -> float:
        """The largest magnitude of the symmetric int8 grid with the least mean squared error.

        >>> spread = Histogram(1.0, np.bincount([2047, 100, 100, 100], minlength=BINS) * 1000)
        >>> spread.threshold()
        1.0
        """
        values = self.largest / BINS * (np.arange(BINS) + 0.5)
        steps = SHARES[:, None] * max(self.largest, 1e-12) / LEVELS
        rounded = np.minimum(np.rint(values / steps), LEVELS) * steps
        return float(self.largest * SHARES[np.argmin((rounded - values) ** 2 @ self.counts)])


@dataclass(frozen=True)
class Grid:
    """How a grid is written: its integers, and the nodes that round to it and back, with their attributes."""

    dtype: type[np.signedinteger[Any]]
    pair: Mapping[str, Mapping[str, Any]]
    domain: str = ""

    @property
    def zero(self) -> str:
        return f"grid.zero.{np.dtype(self.dtype)}"


INT8 = Grid(np.int8, {"QuantizeLinear": {}, "DequantizeLinear": {}})
# D-Robotics' own nodes: hb_mapper 1.24.3 takes the standard ones with an int16 zero, and computes nonsense (0 of 500 classes).
INT16 = Grid(np.int16, {"HzQuantize": {"bits": 16}, "HzDequantize": {}}, "horizon")


@dataclass(frozen=True)
class Seen:
    """What a float graph computed: a histogram of every activation by name, and the logits (n, classes)."""

    histograms: Mapping[str, Histogram]
    logits: Array


def observe(graph: onnx_ir.Model, images: Array) -> Seen:
    """What the float `graph` computes from `images` (n, C, h, w), one at a time."""
    session, names = _session(graph)
    output = graph.graph.outputs[0].name
    largest: dict[str, float] = {}
    for name, value in _values(session, names, images):
        largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max()))
    counts, logits = {name: np.zeros(BINS, np.int64) for name in largest}, []
    for name, value in _values(session, names, images):
        cells = (np.abs(value.ravel()) * (BINS / max(largest[name], 1e-12))).astype(np.int32)
        counts[name] += np.bincount(np.minimum(cells, BINS - 1), minlength=BINS)
        if name == output:
            logits.append(value.ravel())
    return Seen({name: Histogram(largest[name], counts[name]) for name in largest}, np.stack(logits))


def _session(graph: onnx_ir.Model) -> tuple[Any, list[str]]:
    """An ONNX Runtime session whose outputs are all activations, and their names; nothing is fused away."""
    import onnx
    import onnx_ir
    import onnxruntime

    proto = onnx_ir.to_proto(graph)
    names = [name for node in proto.graph.node for name in node.output]
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = proto.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]), names


def _values(session: Any, names: list[str], images: Array) -> Iterator[tuple[str, Array]]:
    """Every activation of every image, the image itself first."""
    feed = session.get_inputs()[0].name
    for image in images:
        yield feed, image
        yield from zip(names, session.run(names, {feed: image[None]}), strict=True)


def thresholds(graph: onnx_ir.Model, seen: Seen) -> dict[str, float]:
    """The largest magnitude of the grid of every activation, by name."""
    ends = {name: histogram.threshold() for name, histogram in seen.histograms.items()}
    for node in graph.graph:
        source, output = node.inputs[0].name, node.outputs[0].name  # type: ignore[union-attr]
        if source in ends and output in ends and node.op_type in MOVES:
            ends[output] = ends[source]
        if source in ends and node.op_type == "Exp":
            ends[source] = min(seen.histograms[source].largest, VANISHES)
    return ends


def attained(ends: Mapping[str, float], seen: Seen) -> dict[str, float]:
    """`ends`, none beyond the largest magnitude that was `seen`.

    A compiler may derive a threshold in place of measuring it: D-Robotics' mapper ends the output of an Exp at e to the
    threshold t of its input, which is symmetric, although everything there is below zero. On a grid to e^17 every value of
    a softmax is rounded to zero (second model: 10 of 64 classes agree).
    """
    known = seen.histograms
    return {name: min(end, known[name].largest) if name in known else end for name, end in ends.items()}


def with_grids(graph: onnx_ir.Model, ends: Mapping[str, float], wide: Collection[str] = ()) -> onnx_ir.Model:
    """A copy of the float `graph` with a symmetric grid, as a pair of nodes, behind every tensor of `ends`.

    Args:
        graph: of opset 10 at least.
        ends: largest magnitude of the grid by name of an input, a constant or an activation; other names are left out.
        wide: names whose grid is int16; of all others it is int8.
    """
    import onnx
    import onnx_ir

    proto = onnx_ir.to_proto(graph)
    old, nodes, read = list(proto.graph.node), proto.graph.node, dict[str, str]()
    constants, constant = proto.graph.initializer, onnx.numpy_helper.from_array
    names = [value.name for value in (*proto.graph.input, *constants)]
    for form in (INT8, INT16)[: 2 if wide else 1]:
        constants.append(constant(np.array(0, form.dtype), form.zero))
    if wide:
        proto.opset_import.append(onnx.helper.make_opsetid(INT16.domain, 1))
    del nodes[:]

    def grid(name: str) -> None:
        if name not in ends:
            return
        form, source = INT16 if name in wide else INT8, name
        scale = max(ends[name], 1e-8) / np.iinfo(form.dtype).max
        constants.append(constant(np.array(scale, np.float32), f"{name}.scale"))
        for kind, attributes in form.pair.items():
            output = f"{name}.{'de' * (source != name)}quantize"
            inputs = [source, f"{name}.scale", form.zero]
            nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, domain=form.domain, **attributes))
            source = output
        read[name] = source

    for name in names:
        grid(name)
    for node in old:
        node.input[:] = [read.get(name, name) for name in node.input]
        nodes.append(node)
        for name in node.output:
            grid(name)
    return onnx_ir.from_proto(proto)
