"""ONNX Runtime on an NVIDIA GPU, through its CUDA or its TensorRT execution provider: where TensorRT itself is not at hand.

The graph is TensorRT's strongly typed one. ONNX Runtime replaces a provider that it cannot start by the CPU, with no more than
a message on the terminal; here that is an error, and so is any node left to the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compressor.errors import BundleError, TargetUnavailable
from compressor.types import Artifact, Availability, BuildOptions
from targets import _runtime, _tensorrt, ort
from targets._artifacts import check_files, check_precision

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "available", "build", "open", "providers", "variants"]

NAME = "ort-cuda"
CAPABILITIES = replace(_tensorrt.CAPABILITIES, precisions=("fp32", "fp16"), narrow=("w8a8",))
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
FIX = "On a machine with an NVIDIA GPU: pip uninstall onnxruntime, then pip install onnxruntime-gpu"


def available() -> Availability:
    """Whether this onnxruntime has the CUDA provider, and this machine a GPU."""
    state = _runtime.loads("onnxruntime", FIX)
    if not state.available:
        return state
    import onnxruntime

    version, has = state.version, onnxruntime.get_available_providers()
    if CUDA not in has:
        reason = f"onnxruntime {version} is built without {CUDA}; it has {', '.join(has)}"
        return Availability(available=False, version=version, reason=reason, fix=FIX)
    if not _tensorrt.gpus():
        reason = "the CUDA driver finds no GPU"
        return Availability(
            available=False, version=version, reason=reason, fix="Run it on a machine with an NVIDIA GPU."
        )
    return Availability(available=True, version=version)


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """One ``.onnx`` file under ``options.out_dir``, every float of it of the precision asked for.

    Raises:
        ConfigError: the target does not run ``options.precision``, or a weight is beyond fp16's range.
    """
    check_precision(NAME, CAPABILITIES, options)
    return ort.write(NAME, _tensorrt.typed(graph, options.precision), options, {"provider": "cuda"})


def variants(artifact: Artifact) -> tuple[Artifact, ...]:
    """`artifact`, and the same file on the TensorRT provider where this onnxruntime has it."""
    import onnxruntime

    if TENSORRT not in onnxruntime.get_available_providers():
        return (artifact,)
    return artifact, replace(artifact, settings={**artifact.settings, "provider": "tensorrt"})


def providers(artifact: Artifact) -> tuple[ort.Provider, ...]:
    """What runs `artifact`, the preferred one first; never the CPU. float32 is float32, not the tensor cores' 19 bits."""
    cuda = (CUDA, {"use_tf32": "0"})
    if artifact.settings.get("provider") != "tensorrt":
        return (cuda,)
    floats, integers = str(int(artifact.precision != "fp32")), str(int(artifact.precision == "w8a8"))
    return (TENSORRT, {"trt_fp16_enable": floats, "trt_int8_enable": integers}), cuda


def open(artifact: Artifact, threads: int = 1) -> ort.OrtSession:
    """A session on this machine's GPU; `threads` are those of the host's part.

    Raises:
        TargetUnavailable: there is no GPU or no provider for it, or a node would run on the CPU.
        BundleError: the file is missing or changed.
    """
    state = available()
    if not state.available:
        raise TargetUnavailable(f"Target {NAME!r} is not available: {state.reason}.", hint=state.fix)
    check_files(artifact)
    return session(artifact, threads)


def session(artifact: Artifact, threads: int) -> ort.OrtSession:
    """`open` without asking first: ONNX Runtime refuses what would run on the CPU."""
    try:
        return ort.OrtSession(artifact, threads, providers(artifact))
    except BundleError as error:
        raise TargetUnavailable(
            f"Target {NAME!r} must run every node on the GPU, got: {str(error.__cause__).rstrip('.')}.",
            hint="The package's requirements (CUDA, cuDNN, TensorRT) must be installed as ONNX Runtime documents them.",
        ) from error
