"""What both TensorRT targets share: the strongly typed graph, and what became of it in the engine, layer by layer.

TensorRT 11 accepts only strongly typed networks, and 10 and RTX accept them too, so there is one graph for all: the graph
says every precision, the builder chooses nothing. fp16 and bf16 convert every weight and activation; w8a8 is symmetric
int8, fp8 the 8-bit float e4m3, around the linear layers with fp16 everywhere else. Inputs and outputs stay float32.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.types import Array, Artifact, BuildOptions, Capabilities, OpRecord, Precision
from targets import _tensorrt_worker
from targets._artifacts import check_files, check_precision, describe, digest

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "CAPABILITIES",
    "Call",
    "EngineSession",
    "Layer",
    "batch_shapes",
    "build_engine",
    "engine_layers",
    "findings",
    "gpus",
    "here",
    "plan",
    "records",
    "typed",
]

Call = Callable[[str, Mapping[str, Any], Mapping[str, Array]], tuple[dict[str, Any], dict[str, Array]]]

CAPABILITIES = Capabilities(
    layout="tokens", opset=20, precisions=("fp32", "fp16", "bf16", "w8a8", "fp8"), equal_heads=True, zero_points=False
)
LARGEST_BATCH = 64  # that an engine takes, unless it is tuned for a larger one
FLOATS = {"fp16": "FLOAT16", "bf16": "BFLOAT16", "w8a8": "FLOAT16", "fp8": "FLOAT16"}  # outside the quantized products
NAMES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8"}  # engine's type -> ours
EXPECTED = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "w8a8": "HALF", "fp8": "HALF"}  # network's float layers
FLOAT_TYPES = ("FLOAT", "HALF", "BF16")
TYPED_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "NORMALIZATION", "SOFTMAX", "ACTIVATION", "ELEMENTWISE", "SHUFFLE")
FIRST_FP8 = 89  # compute capability 8.9, Ada; Ampere has no 8-bit floats
PRODUCTS = ("gemm", "correlation", "runtime_fusion")


# --------------------------------------------------------------------------- the graph


def typed(graph: onnx_ir.Model, precision: Precision) -> onnx_ir.Model:
    """A copy of `graph` whose every float is of `precision`, but for its float32 inputs and outputs.

    Raises:
        ConfigError: a weight is beyond fp16's range.
    """
    import onnx_ir as ir

    copy = ir.from_proto(ir.to_proto(graph))
    if precision not in FLOATS:
        return copy
    dtype = ir.DataType[FLOATS[precision]]
    for value in copy.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            assert value.const_value is not None
            array = value.const_value.numpy()
            if precision != "bf16" and np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
                raise ConfigError(
                    f"Weight {value.name!r} must be within fp16's range, got {np.abs(array).max():.3g}.",
                    hint="Use bf16, which has float32's range.",
                )
            value.const_value = ir.tensor(array.astype(dtype.numpy()), name=value.name)
            value.dtype = dtype
    for value in copy.graph.inputs:
        _cast_input(copy.graph, value, dtype)
    for index, value in enumerate(copy.graph.outputs):
        copy.graph.outputs[index] = _cast_output(copy.graph, value, dtype)
    return copy


def _cast_input(graph: onnx_ir.Graph, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> None:
    import onnx_ir as ir

    readers = list(value.uses())
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype.value)], name=f"{value.name}.cast")
    cast.outputs[0].name = cast.name
    for node, index in readers:
        node.replace_input_with(index, cast.outputs[0])
    graph.insert_before(graph[0], cast)


def _cast_output(graph: onnx_ir.Graph, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
    import onnx_ir as ir

    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT.value)], name=f"{value.name}.cast")
    out = cast.outputs[0]
    out.name, out.shape, out.type = value.name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    value.name, value.type = f"{value.name}.typed", ir.TensorType(dtype)
    graph.append(cast)
    return out


# --------------------------------------------------------------------------- plan and engine


def plan(target: str, graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """A build plan: the strongly typed graph, and what to make of it. Needs no GPU and no vendor library.

    Raises:
        ConfigError: the target does not build ``options.precision``, or the chip not fp8; a grid is asymmetric, or a weight is
            beyond fp16's range.
    """
    import onnx_ir

    check_precision(target, CAPABILITIES, options)
    check_fp8(target, options.precision, options.chip)
    for node in graph.graph:
        zero = node.inputs[2] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
        if zero is not None and zero.const_value is not None and zero.const_value.numpy().any():
            raise ConfigError(
                f"Grid {zero.name!r} of target {target!r} must be symmetric, got a zero point other than 0.",
                hint="TensorRT multiplies symmetric integers only.",
            )
    graph = typed(graph, options.precision)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    path = options.out_dir / f"{options.name}.onnx"
    path.write_bytes(onnx_ir.to_proto(graph).SerializeToString(deterministic=True))
    return describe(target, graph, options, (path,), {"stage": "plan", "chip": options.chip})


def build_engine(artifact: Artifact, out_dir: Path, settings: Mapping[str, str], call: Call) -> Artifact:
    """The engine that build plan `artifact` describes, and the builder's own account of it.

    Args:
        artifact: what `plan` returned; other artifacts are refused. Its settings may name the ``batch`` to tune for, else 1.
        out_dir: receives ``NAME.engine`` and ``NAME.layers.json``.
        settings: ``package``, ``timing_cache`` and ``portable`` of the worker's `build`.
        call: runs a function of the worker.

    Raises:
        BundleError: `artifact` is no build plan, or its file was changed.
        ConfigError: the chip has no fp8, which the plan asks for.
        TargetUnavailable: the library is missing, or it refused.
    """
    check_files(artifact)
    if artifact.settings.get("stage") != "plan":
        raise BundleError(f"{artifact.path}: artifact must be a build plan, got an engine.", hint="Use it as it is.")
    chip = artifact.settings.get("chip", "")
    check_fp8(artifact.target, artifact.precision, chip)
    out_dir.mkdir(parents=True, exist_ok=True)
    path, source = out_dir / f"{artifact.path.stem}.engine", artifact.inputs[0]
    shapes = batch_shapes(source.shape, int(artifact.settings.get("batch", "1")))
    given = {"onnx": str(artifact.path), "engine": str(path), "input": source.name, "shapes": shapes}
    built, _ = call("build", {**given, "chip": chip, **settings}, {})
    layers = path.with_suffix(".layers.json")
    layers.write_text(json.dumps(built, indent=1), encoding="utf-8")
    told = {"stage": "engine", "chip": chip, "version": built["version"]}
    told["batch"] = artifact.settings.get("batch", "1")
    files = (path, layers)
    return replace(
        artifact,
        path=path,
        sha256=digest(files),
        size_bytes=sum(file.stat().st_size for file in files),
        settings=told | findings(built, artifact.precision),
        files=files,
    )


def batch_shapes(shape: tuple[int, ...], batch: int) -> list[list[int]]:
    """Least, tuned for and largest shape of an input (-1, ...).

    >>> batch_shapes((-1, 3, 224, 224), 8)
    [[1, 3, 224, 224], [8, 3, 224, 224], [64, 3, 224, 224]]
    """
    return [[n if size == -1 else size for size in shape] for n in (1, batch, max(batch, LARGEST_BATCH))]


def check_fp8(target: str, precision: Precision, chip: str) -> None:
    """Raises ConfigError when fp8 is asked for on a chip that has none: below SM89, or "ampere+"."""
    number = chip.removeprefix("SM")
    below = chip == "ampere+" or (number.isdigit() and int(number) < FIRST_FP8)
    if precision == "fp8" and below:
        raise ConfigError(
            f"The chip of target {target!r} must be SM{FIRST_FP8} or later for fp8, got {chip!r}.",
            hint="Ada, Hopper, Blackwell and Thor have 8-bit floats; on other chips take w8a8 or fp16.",
        )


class EngineSession:
    """An engine on the GPU of this machine, from host memory to host memory; every session has buffers of its own."""

    def __init__(self, artifact: Artifact, package: str, call: Call) -> None:
        check_files(artifact)
        if artifact.settings.get("stage") == "plan":
            raise TargetUnavailable(
                f"{artifact.path}: artifact of target {artifact.target!r} must be an engine, got a build plan.",
                hint="Build it on the machine with the GPU: vitrim build BUNDLE.",
            )
        self._artifact, self._call = artifact, call
        loaded, _ = call("load", {"package": package, "engine": str(artifact.path)}, {})
        self._arguments = {"package": package, **loaded}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return self._call("run", self._arguments, inputs)[1]

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Kernels under the names of the graph's nodes, median time of a few profiled runs."""
        return records(self._artifact, self._call("profile", self._arguments, inputs)[0]["times"])


def gpus() -> int:
    """How many GPUs the CUDA driver finds on this machine; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    done = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if done else 0


def here(target: str, fix: str) -> Call:
    """Runs a function of the worker in this process; its failures become TargetUnavailable with `fix` as the hint."""

    def call(
        name: str, arguments: Mapping[str, Any], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        try:
            done: tuple[dict[str, Any], dict[str, Array]] = getattr(_tensorrt_worker, name)(arguments, arrays)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise TargetUnavailable(f"Target {target!r} must {name} the engine, got: {error}.", hint=fix) from error
        return done

    return call


# --------------------------------------------------------------------------- the engine


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine: the graph's nodes it executes, and the types it reads and writes."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Of what it reads: "int8" where it multiplies integers."""
        return self.reads[0] if self.reads else ""

    @property
    def multiplies(self) -> bool:
        """Whether it executes a matrix product, alone or fused with what surrounds it."""
        return self.kind in PRODUCTS or self.fused_attention or "MulSum" in self.name

    @property
    def fused_attention(self) -> bool:
        """Whether both attention products and the softmax are one kernel."""
        return "mha" in self.name

    @property
    def only_converts(self) -> bool:
        """Whether it is a pass over memory that changes nothing but the type."""
        return re.fullmatch(r"__myl_(Cast|Move|Resh)*Cast(Cast|Move|Resh)*_myl\d+_\d+", self.name) is not None


def engine_layers(lines: Iterable[str]) -> tuple[Layer, ...]:
    """Layers from the builder's own table, in order of execution."""
    found = []
    for line in lines:
        head = re.match(r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], (?:Constants: .*?, )?Outputs: \[(.*)", line)
        if head is None:
            continue
        name, kind, inputs, rest = head.groups()
        nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)
        found.append(Layer(name, kind, tuple(nodes), _types(inputs), _types(rest.partition("TacticName")[0])))
    return tuple(found)


def _types(text: str) -> tuple[str, ...]:
    return tuple(NAMES.get(name, name) for name in re.findall(r"Datatype: (\w+)", text))


def findings(built: Mapping[str, Any], precision: Precision) -> dict[str, str]:
    """What was asked for against what the engine does, as settings of the artifact.

    Args:
        built: what the worker's `build` returned.
        precision: asked for.

    Returns:
        ``products`` matrix products by the type they read; ``fused_attention`` blocks whose attention is one kernel;
        ``typed_layers`` of the parsed network that compute in floats, ``foreign_types`` those in another than asked for;
        ``added_casts`` float casts that are not ours; ``conversions`` kernels that only convert; ``kernels`` in all.
    """
    layers, network = engine_layers(built["layers"]), built["network"]
    wanted = EXPECTED[precision]
    types = [out for _, kind, out in network if kind in TYPED_LAYERS and out in FLOAT_TYPES]
    casts = [n for n, kind, out in network if kind == "CAST" and out in FLOAT_TYPES and not n.endswith(".cast")]
    products = Counter(layer.precision for layer in layers if layer.multiplies)
    return {
        "products": ", ".join(f"{count} {name}" for name, count in sorted(products.items())),
        "fused_attention": str(sum(layer.fused_attention for layer in layers)),
        "typed_layers": str(len(types)),
        "foreign_types": str(sum(out != wanted for out in types)),
        "added_casts": str(len(casts)),
        "conversions": str(sum(layer.only_converts for layer in layers)),
        "kernels": str(len(layers)),
    }


def records(artifact: Artifact, times: Mapping[str, float]) -> tuple[OpRecord, ...]:
    """One record per kernel under the names of the graph's nodes, with `times` by kernel name; 0.0 where none was taken.

    Raises:
        BundleError: the engine's list of layers is missing or is none.
    """
    try:
        report = next(file for file in artifact.files if file.suffix == ".json")
        layers = engine_layers(json.loads(report.read_text(encoding="utf-8"))["layers"])
    except (StopIteration, OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{artifact.path}: an engine must have its list of layers beside it, got {error!r}.", hint="Build it again."
        ) from error
    return tuple(
        OpRecord(" + ".join(layer.nodes) or layer.name, layer.kind, "GPU", layer.precision, times.get(layer.name, 0.0))
        for layer in layers
    )
