"""The reference target: a pure NumPy interpreter of the emitted graphs, always available and deliberately simple.

It runs with no runtime installed, so the whole pipeline can be tested anywhere; it is slow and makes no claim.
The artifact is one ``.npz``: every constant under its name, and the program as JSON bytes under ``program``.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import BundleError
from compressor.types import Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord
from targets._artifacts import check_files, check_precision, describe

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "available", "build", "open"]

NAME = "null"
CAPABILITIES = Capabilities(
    layout="tokens",
    opset=20,
    precisions=("fp32", "w8a8"),
    narrow=("w4a8", "w6a6", "w4a4", "w8a32", "w4a32"),
    patch="unshuffle",
)

Attributes = Mapping[str, Any]


def available() -> Availability:
    """Always: NumPy is part of the core installation."""
    return Availability(available=True, version=np.__version__)


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """One ``.npz`` file under ``options.out_dir``.

    Raises:
        ConfigError: the graph has an operator the interpreter does not know, or the precision is not built.
    """
    check_precision(NAME, CAPABILITIES, options)
    nodes = [
        {
            "name": node.name,
            "type": node.op_type,
            "inputs": [value.name if value is not None else "" for value in node.inputs],
            "outputs": [value.name for value in node.outputs],
            "attributes": {name: attr.value for name, attr in node.attributes.items()},
        }
        for node in graph.graph
    ]
    constants = {
        name: _storable(value.const_value.numpy())
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None
    }
    program = np.frombuffer(json.dumps({"nodes": nodes}).encode(), dtype=np.uint8)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    path = options.out_dir / f"{options.name}.npz"
    _save(path, {"program": program, **constants})
    return describe(NAME, graph, options, (path,), {})


def open(artifact: Artifact, threads: int = 1) -> NullSession:
    """A session of `artifact`; `threads` has no meaning here.

    Raises:
        BundleError: the file is missing, changed, or not written by this target.
    """
    del threads  # Unused: NumPy decides
    check_files(artifact)
    try:
        with artifact.path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = dict(stored)
        nodes = json.loads(bytes(arrays.pop("program")))["nodes"]
        unknown = sorted({node["type"] for node in nodes} - OPERATORS.keys())
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{artifact.path}: must be a file written by target 'null', got: {error}.", hint="Build it again."
        ) from error
    if unknown:
        raise BundleError(f"{artifact.path}: operators must be known to target 'null', got {', '.join(unknown)}.")
    return NullSession(artifact, nodes, arrays)


class NullSession:
    """Interprets the program node by node."""

    def __init__(self, artifact: Artifact, nodes: list[dict[str, Any]], constants: Mapping[str, Array]) -> None:
        self._artifact = artifact
        self._nodes = nodes
        self._constants = constants

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        values = {"": None, **self._constants, **inputs}
        for node in self._nodes:
            results = OPERATORS[node["type"]](node["attributes"], *(values[name] for name in node["inputs"]))
            values.update(zip(node["outputs"], results if isinstance(results, list) else [results], strict=True))
        return {spec.name: np.asarray(values[spec.name]) for spec in self._artifact.outputs}

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Every node, in float; times are not measured."""
        del inputs  # Unused
        return tuple(OpRecord(node["name"], node["type"], "NumPy", "fp32", 0.0) for node in self._nodes)


def _storable(array: Array) -> Array:
    """`array`; 4-bit integers, which NumPy has not, as int8."""
    return array if array.dtype.isbuiltin == 1 else array.astype(np.int8)


def _save(path: Any, arrays: Mapping[str, Array]) -> None:
    """An uncompressed ``.npz`` whose bytes depend on its contents only (``np.savez`` stores the time of day)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)


# --------------------------------------------------------------------------- operators, as ONNX defines them


def _reshape(a: Attributes, x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def _pad(a: Attributes, x: Array, pads: Array) -> Array:
    return np.pad(x, list(zip(pads[: x.ndim], pads[x.ndim :], strict=True)))


def _slice(a: Attributes, x: Array, start: Array, stop: Array, axis: Array) -> Array:
    return x[(slice(None),) * int(axis[0]) + (slice(int(start[0]), int(stop[0])),)]


def _split(a: Attributes, x: Array, sizes: Array) -> list[Array]:
    return np.split(x, np.cumsum(sizes)[:-1], axis=a["axis"])


def _softmax(a: Attributes, x: Array) -> Array:
    e = np.exp(x - x.max(axis=a["axis"], keepdims=True))
    return np.asarray(e / e.sum(axis=a["axis"], keepdims=True))


def _layer_norm(a: Attributes, x: Array, scale: Array, shift: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + np.float32(a["epsilon"])) * scale + shift)


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _gelu(a: Attributes, x: Array) -> Array:
    if a.get("approximate") == "tanh":
        unit = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3))
    else:
        unit = _erf(x / np.float32(math.sqrt(2)))
    return np.asarray(np.float32(0.5) * x * (1 + unit))


def _sigmoid(a: Attributes, x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.maximum(x, -80))))  # the bound only avoids an overflow warning


def _quantize(a: Attributes, x: Array, scale: Array, zero: Array) -> Array:
    limits = np.iinfo(zero.dtype)
    return np.asarray(np.clip(np.rint(x / scale) + zero, limits.min, limits.max), dtype=zero.dtype)


def _dequantize(a: Attributes, q: Array, scale: Array, zero: Array | int = 0) -> Array:
    zero = np.asarray(zero, np.float32)
    if "block_size" in a:
        scale = np.repeat(scale, a["block_size"], axis=a["axis"])
    elif scale.ndim:
        scale, zero = (
            v.reshape([-1 if axis == a["axis"] % q.ndim else 1 for axis in range(q.ndim)]) for v in (scale, zero)
        )
    return np.asarray((q.astype(np.float32) - zero) * scale)


OPERATORS: Mapping[str, Callable[..., Array | list[Array]]] = {
    "Add": lambda a, x, y: x + y,
    "Clip": lambda a, x, low, high: np.clip(x, low, high),
    "Concat": lambda a, *xs: np.concatenate(xs, axis=a["axis"]),
    "DequantizeLinear": _dequantize,
    "Gelu": _gelu,
    "Identity": lambda a, x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda a, x, y: x @ y,
    "Mul": lambda a, x, y: x * y,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "ReduceMean": lambda a, x, axes: x.mean(axis=tuple(axes), keepdims=bool(a["keepdims"])),
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Transpose": lambda a, x: np.transpose(x, a["perm"]),
}
