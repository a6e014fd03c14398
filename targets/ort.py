"""ONNX Runtime on the CPU: the torch-free default of every device.

int8 is emitted as ONNX Runtime's own integer operators, so nothing depends on its optimizer recognizing QDQ pairs.
Weights stored alone as integers are unpacked once, when a session opens: its kernel that multiplies floats by packed weights
took 1.03 to 1.3 times as long on the shapes of DeiT in 4 bits, 1.5 to 3.3 in 8; its faster one rounds the inputs to int8.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import BundleError
from compressor.types import WEIGHT_ONLY, Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord
from targets import _runtime
from targets._artifacts import check_files, check_precision, describe

if TYPE_CHECKING:
    import onnx_ir
    import onnxruntime

__all__ = ["CAPABILITIES", "CPU", "NAME", "OrtSession", "Provider", "available", "build", "open", "write"]

Provider = tuple[str, Mapping[str, str]]  # ONNX Runtime's name of it, and its options

NAME = "ort"
CAPABILITIES = Capabilities(
    layout="tokens",
    opset=20,
    precisions=("fp32", "w8a8"),
    narrow=("w4a8", "w6a6", "w4a4", "w8a32", "w4a32"),
    attention="fused",
    patch="unshuffle",
    qdq="integer_ops",
)
CPU: Provider = ("CPUExecutionProvider", {})
PROFILED_RUNS = 5
FIX = "pip install onnxruntime"


def available() -> Availability:
    """Whether onnxruntime can be imported."""
    return _runtime.loads("onnxruntime", FIX)


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """One ``.onnx`` file under ``options.out_dir``.

    Raises:
        ConfigError: ONNX Runtime does not run ``options.precision``.
    """
    check_precision(NAME, CAPABILITIES, options)
    return write(NAME, graph, options, {})


def write(target: str, graph: onnx_ir.Model, options: BuildOptions, settings: Mapping[str, str]) -> Artifact:
    """`graph` as one ``.onnx`` file under ``options.out_dir``, an artifact of `target`."""
    import onnx_ir

    options.out_dir.mkdir(parents=True, exist_ok=True)
    path = options.out_dir / f"{options.name}.onnx"
    path.write_bytes(onnx_ir.to_proto(graph).SerializeToString(deterministic=True))
    return describe(target, graph, options, (path,), settings)


def open(artifact: Artifact, threads: int = 1) -> OrtSession:
    """A session of `artifact` on `threads` threads.

    Raises:
        TargetUnavailable: onnxruntime is not installed, or does not load.
        BundleError: the file is missing, changed or not a model ONNX Runtime accepts.
    """
    _runtime.require(NAME, "onnxruntime", FIX)
    check_files(artifact)
    return OrtSession(artifact, threads)


class OrtSession:
    """An `onnxruntime.InferenceSession` with exactly the threads, and on exactly the providers, asked for."""

    def __init__(self, artifact: Artifact, threads: int, providers: Sequence[Provider] = (CPU,)) -> None:
        self._artifact = artifact
        self._threads = threads
        self._providers = providers
        self._session = self._load(self._options())
        self._outputs = [spec.name for spec in artifact.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Nodes as executed after ONNX Runtime's own fusions, median time of a few profiled runs."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._load(options)
            for _ in range(PROFILED_RUNS + 1):
                session.run(self._outputs, dict(inputs))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _records(events)

    def _options(self) -> onnxruntime.SessionOptions:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.force_spinning_stop", "1")  # no busy waiting between two runs
        if self._artifact.precision in WEIGHT_ONLY:
            options.add_session_config_entry(
                "session.disable_quant_qdq", "1"
            )  # constants are unpacked, then, not fused
        if CPU not in self._providers:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # an error, never a slow node
        options.log_severity_level = 3  # errors only: they are raised, nothing else is printed
        return options

    def _load(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        path, providers = self._artifact.path, [(name, dict(given)) for name, given in self._providers]
        bad_model = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented)
        bad_provider = (state.EPFail, RuntimeError)  # one that cannot be started
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a provider that is not there; without the fallback it is an error
                return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        except (*bad_model, *bad_provider) as error:
            raise BundleError(
                f"{path}: must be a model ONNX Runtime accepts, got: {error}.", hint="Build it again."
            ) from error


def _records(events: list[dict[str, Any]]) -> tuple[OpRecord, ...]:
    """One record per executed node, in order of first execution; the first run is warm-up."""
    times: dict[str, list[float]] = defaultdict(list)
    about: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1000.0)
            about.setdefault(name, event["args"])
    return tuple(
        OpRecord(
            name,
            args["op_name"],
            args["provider"].removesuffix("ExecutionProvider"),
            _precision(args),
            statistics.median(times[name][1:]),
        )
        for name, args in about.items()
    )


def _precision(args: Mapping[str, Any]) -> str:
    """ "int8" when the node reads 8-bit integers, to multiply or to move them, else the dtype of its first input.

    DequantizeLinear, which makes floats of them, counts as what it makes.
    """
    side = "output_type_shape" if args.get("op_name") == "DequantizeLinear" else "input_type_shape"
    types = [next(iter(shape)) for shape in args.get(side, [])]
    if not types:
        return ""
    return "int8" if types[0] in ("int8", "uint8") else {"float": "fp32"}.get(types[0], types[0])
