"""OpenVINO on the CPU: fp32, bf16 by hint, and int8 from our own QDQ graph or from NNCF."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.types import Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord
from targets._artifacts import check_files, check_precision, describe

if TYPE_CHECKING:
    import onnx_ir
    import openvino

__all__ = ["CAPABILITIES", "NAME", "available", "build", "open"]

NAME = "openvino"
CAPABILITIES = Capabilities(layout="tokens", opset=20, precisions=("fp32", "bf16", "w8a8"))
HINTS = {"fp32": "f32", "bf16": "bf16", "w8a8": "f32"}  # of everything that is not int8
FIX = "pip install 'vitrim[openvino]'"


def available() -> Availability:
    """Whether openvino can be imported."""
    if find_spec("openvino") is None:
        return Availability(available=False, reason="openvino is not installed", fix=FIX)
    import openvino

    return Availability(available=True, version=openvino.__version__)


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """An ``.xml`` and a ``.bin`` under ``options.out_dir``; the precision hint is stored in the artifact's settings.

    With ``options.quantizer == "nncf"`` the graph is float and NNCF quantizes it on ``options.calibration``.

    Raises:
        TargetUnavailable: openvino (or nncf, where asked for) is not installed.
        ConfigError: OpenVINO does not run ``options.precision``, or NNCF has nothing to calibrate on.
    """
    import onnx_ir

    check_precision(NAME, CAPABILITIES, options)
    _require("openvino")
    import openvino

    options.out_dir.mkdir(parents=True, exist_ok=True)
    core = openvino.Core()
    model = core.read_model(onnx_ir.to_proto(graph).SerializeToString(deterministic=True), b"")
    if options.quantizer == "nncf" and options.precision == "w8a8":
        model = _nncf(model, options)
    path = options.out_dir / f"{options.name}.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    settings = {"INFERENCE_PRECISION_HINT": HINTS[options.precision]}
    return describe(NAME, graph, options, (path, path.with_suffix(".bin")), settings)


def open(artifact: Artifact, threads: int = 1) -> OpenVinoSession:
    """A session of `artifact` on `threads` threads.

    Raises:
        TargetUnavailable: openvino is not installed.
        BundleError: a file is missing, changed or not a model OpenVINO accepts.
    """
    _require("openvino")
    check_files(artifact)
    return OpenVinoSession(artifact, threads)


class OpenVinoSession:
    """A compiled model and one inference request."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._artifact = artifact
        self._threads = threads
        self._compiled = self._compile({})
        self._request = self._compiled.create_infer_request()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        results = self._request.infer(dict(inputs))
        return {spec.name: results[spec.name].copy() for spec in self._artifact.outputs}

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Nodes of OpenVINO's execution graph with their run-time precision, times of one profiled run."""
        compiled = self._compile({"PERF_COUNT": "YES"})
        request = compiled.create_infer_request()
        for _ in range(2):  # the first is warm-up
            request.infer(dict(inputs))
        times = {info.node_name: info.real_time.total_seconds() * 1000.0 for info in request.get_profiling_info()}
        records = []
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = {
                key: node.rt_info[key].astype(str) for key in ("layerType", "runtimePrecision") if key in node.rt_info
            }
            if info:
                name = node.get_friendly_name()
                records.append(
                    OpRecord(name, info["layerType"], "CPU", _precision(info["runtimePrecision"]), times.get(name, 0.0))
                )
        return tuple(records)

    def _compile(self, extra: Mapping[str, str]) -> openvino.CompiledModel:
        import openvino

        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(self._threads),
            **self._artifact.settings,
            **extra,
        }
        try:
            return openvino.Core().compile_model(self._artifact.path, "CPU", config)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1]
            raise BundleError(
                f"{self._artifact.path}: must be a model OpenVINO accepts, got: {first}.", hint="Build it again."
            ) from error


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise TargetUnavailable(f"Target 'openvino' must have {package} installed, got none.", hint=FIX)


def _precision(name: str) -> str:
    return {"f32": "fp32", "i8": "int8", "u8": "int8"}.get(name.lower(), name.lower())


def _nncf(model: openvino.Model, options: BuildOptions) -> openvino.Model:
    if not options.calibration:
        raise ConfigError("BuildOptions.calibration must hold at least one batch for NNCF, got none.")
    _require("nncf")
    import nncf

    images = [image[None] for batch in options.calibration for image in batch]
    data = nncf.Dataset(images, lambda image: {"pixels": image})
    return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
