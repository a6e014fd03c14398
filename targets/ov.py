"""OpenVINO on the CPU: fp32, bf16 by hint, and int8 from our own QDQ graph or from NNCF; weights alone in 8 or 4 bits."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import BundleError, ConfigError
from compressor.types import WEIGHT_ONLY, Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord
from targets import _runtime
from targets._artifacts import check_files, check_precision, describe

if TYPE_CHECKING:
    import onnx_ir
    import openvino

__all__ = ["CAPABILITIES", "NAME", "available", "build", "open", "variants"]

NAME = "openvino"
CAPABILITIES = Capabilities(
    layout="tokens",
    opset=20,
    precisions=("fp32", "bf16", "w8a8"),
    narrow=("w4a8", "w6a6", "w4a4", "w8a32", "w4a32"),
    patch="unshuffle",
    int8_scores=True,
)
HINT = "INFERENCE_PRECISION_HINT"  # of everything that is not int8; OpenVINO's default is bf16 where the CPU has it
HINTS = {"fp32": "f32", "bf16": "bf16"} | dict.fromkeys(WEIGHT_ONLY, "f32")
ROUNDING = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # of the inputs of packed weights, to int8 by default; 0: they stay floats
OFFERED = {HINT: ("f32", "bf16"), ROUNDING: ("0",)}  # what `build` and `variants` write, and all that `open` takes
PRECISIONS = {"f32": "fp32", "i8": "int8", "u8": "int8"}  # OpenVINO's names, where ours differ
RECORDED = ("layerType", "runtimePrecision", "originalLayersNames")
NO_WORK = ("Input", "Output", "Reshape")  # listed in the execution graph; nothing is computed or moved for them
PROFILED_RUNS = 10
FIX = "pip install 'vitrim[openvino]'"


def available() -> Availability:
    """Whether openvino can be imported."""
    return _runtime.loads("openvino", FIX)


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """An ``.xml`` and a ``.bin`` under ``options.out_dir``; the precision hint is stored in the artifact's settings.

    With ``options.quantizer == "nncf"`` the graph is float and NNCF quantizes it on ``options.calibration``.

    Raises:
        TargetUnavailable: openvino (or nncf, where asked for) is not installed.
        ConfigError: OpenVINO does not run ``options.precision``, or NNCF has nothing to calibrate on.
    """
    import onnx_ir

    check_precision(NAME, CAPABILITIES, options)
    _runtime.require(NAME, "openvino", FIX)
    import openvino

    options.out_dir.mkdir(parents=True, exist_ok=True)
    model = openvino.Core().read_model(onnx_ir.to_proto(graph).SerializeToString(deterministic=True), b"")
    if options.quantizer == "nncf" and options.precision == "w8a8":
        model = _nncf(model, options)
    _name(model, {value.name for node in graph.graph for value in node.outputs} | set(graph.graph.initializers))
    path = options.out_dir / f"{options.name}.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return describe(NAME, graph, options, (path, path.with_suffix(".bin")), _settings(options.precision))


def variants(artifact: Artifact) -> tuple[Artifact, ...]:
    """`artifact`, then the same files under settings that may be faster on another CPU: to be measured, not assumed."""
    if artifact.precision != "w8a8" or not _native_bf16():
        return (artifact,)
    other = "f32" if artifact.settings[HINT] == "bf16" else "bf16"
    return artifact, replace(artifact, settings={**artifact.settings, HINT: other})


def open(artifact: Artifact, threads: int = 1) -> OpenVinoSession:
    """A session of `artifact` on `threads` threads.

    Raises:
        TargetUnavailable: openvino is not installed, or does not load.
        BundleError: a file is missing, changed or not a model OpenVINO accepts, or a setting is not one of `OFFERED`.
    """
    _runtime.require(NAME, "openvino", FIX)
    check_files(artifact)
    return OpenVinoSession(artifact, threads)


class OpenVinoSession:
    """Compiled for one image with fixed shapes, which is up to a tenth faster; once more for any batch when one comes.

    Threads may share it: they take turns, since an infer request holds the tensors of one inference.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._artifact = artifact
        self._config = {
            **_checked(artifact),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
        }
        self._turn = threading.Lock()
        self._feed = artifact.inputs[0].name
        self._single = self._compile(self._config, fixed=True).create_infer_request()
        self._batched: openvino.InferRequest | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        import openvino

        with self._turn:
            request = self._single
            if len(inputs[self._feed]) != 1:
                if self._batched is None:
                    self._batched = self._compile(self._config, fixed=False).create_infer_request()
                request = self._batched
            # By position and without a copy: by name takes 15 us more, 3 % of the embedded model's time
            pixels = np.ascontiguousarray(inputs[self._feed])
            request.set_input_tensor(openvino.Tensor(pixels, shared_memory=True))
            outputs = request.infer().to_tuple()
        return {spec.name: value for spec, value in zip(self._artifact.outputs, outputs, strict=True)}

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Nodes of OpenVINO's execution graph with their run-time precision, mean time of a few profiled runs.

        OpenVINO reports means over all runs of a request; the first run, which compiles kernels, is taken out of them.
        It counts whole microseconds and calls a node below one "not run": those are kept, at 0 ms.
        """
        fixed = len(inputs[self._feed]) == 1
        compiled = self._compile({**self._config, "PERF_COUNT": "YES"}, fixed=fixed)
        request = compiled.create_infer_request()
        request.infer(dict(inputs), share_inputs=True)
        first = _mean_ms(request)
        for _ in range(PROFILED_RUNS):
            request.infer(dict(inputs), share_inputs=True)
        times = {n: t + (t - first.get(n, t)) / PROFILED_RUNS for n, t in _mean_ms(request).items()}
        nodes = compiled.get_runtime_model().get_ordered_ops()
        records = (_record(n, times[n.get_friendly_name()]) for n in nodes if n.get_friendly_name() in times)
        return tuple(record for record in records if record.type not in NO_WORK)

    def _compile(self, config: Mapping[str, str], *, fixed: bool) -> openvino.CompiledModel:
        import openvino

        core = openvino.Core()
        try:
            model = core.read_model(self._artifact.path)
            if fixed:
                model.reshape([1, *self._artifact.inputs[0].shape[1:]])
            return core.compile_model(model, "CPU", dict(config))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise BundleError(
                f"{self._artifact.path}: must be a model OpenVINO accepts, got: {reason}.", hint="Build it again."
            ) from error


def _checked(artifact: Artifact) -> Mapping[str, str]:
    """The settings of `artifact`, which come from a manifest that nobody vouches for: OpenVINO has some that write files."""
    for name, value in artifact.settings.items():
        if value not in OFFERED.get(name, ()):
            known = "; ".join(f"{key} {' or '.join(values)}" for key, values in OFFERED.items())
            raise BundleError(
                f"{artifact.path}: settings of target {NAME!r} must be among {known}, got {name} {value!r}.",
                hint="Do not use this bundle.",
            )
    return artifact.settings


def _settings(precision: str) -> dict[str, str]:
    """Between int8 linears, bf16 where the CPU has it: a tenth faster than f32 on every DeiT measured."""
    settings = {HINT: HINTS.get(precision, "bf16" if _native_bf16() else "f32")}
    return {**settings, ROUNDING: "0"} if precision in WEIGHT_ONLY else settings


def _native_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _mean_ms(request: openvino.InferRequest) -> dict[str, float]:
    """Mean time per run of every node that is left after fusion, constants aside."""
    return {info.node_name: info.real_time.total_seconds() * 1000.0 for info in request.get_profiling_info()}


def _name(model: openvino.Model, known: Set[str | None]) -> None:
    """Names every operator that is not in `known` by its position; OpenVINO counts through the life of the process."""
    for position, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() not in known:
            node.set_friendly_name(f"{node.get_type_name()}_{position}")


def _record(node: Any, time_ms: float) -> OpRecord:
    info = {key: node.rt_info[key].astype(str) for key in RECORDED if key in node.rt_info}
    precision = info.get("runtimePrecision", "").lower()
    read = [port.get_element_type().get_type_name() for port in node.inputs()]
    if info.get("layerType") == "FullyConnected":  # named by its stored weights, also where it multiplies floats
        precision = read[0]
    names = [PRECISIONS.get(precision, precision)]
    if ".softmax" in info.get("originalLayersNames", "") and len(read) == 3:  # of q, k and v: both products in one node
        names = list(dict.fromkeys(PRECISIONS.get(p, p) for p in (read[0], read[2])))
    return OpRecord(_place(node), info.get("layerType", ""), "CPU", "+".join(names), max(time_ms, 0.0))


def _place(node: Any) -> str:
    """The node's name, behind that of the operator it was split from (``blocks.0.norm1/MVN_7``) where it has none."""
    name = node.get_friendly_name()
    consumer = node
    while "_" in consumer.get_friendly_name().partition(".")[0] and consumer.outputs():
        targets = consumer.output(0).get_target_inputs()
        if not targets:
            break
        consumer = min(targets, key=lambda port: port.get_node().get_friendly_name()).get_node()
    return name if consumer is node else f"{consumer.get_friendly_name()}/{name}"


def _nncf(model: openvino.Model, options: BuildOptions) -> openvino.Model:
    if not options.calibration:
        raise ConfigError("BuildOptions.calibration must hold at least one batch for NNCF, got none.")
    os.environ.setdefault("NNCF_CI", "1")  # NNCF sends no telemetry then; nothing here talks to a network
    _runtime.require(NAME, "nncf", FIX)
    import nncf

    images = [image[None] for batch in options.calibration for image in batch]
    data = nncf.Dataset(images, lambda image: {"pixels": image})
    return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
