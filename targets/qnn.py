"""Qualcomm Hexagon (HTP): quantized by ONNX Runtime's QNN recipe, compiled to a context binary, emulated on x86.

The graph is the token layout at opset 20, where GELU and LayerNorm are one node each: measured with onnxruntime-qnn 2.7.0, the
whole network becomes one HTP context with nothing left on the CPU (opset 18 with an erf GELU falls into 38 pieces). QNN reads
weights, norms and activations in its own QDQ form, so ONNX Runtime's quantizer writes it from the float graph. The emulator
computes what the chip computes; its time says nothing about the chip's.

On a device with `onnxruntime_qnn` beside onnxruntime, `open` runs the context on its HTP, by the very code that drives the
emulator (onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md). This has met no device yet.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import TargetUnavailable
from compressor.types import PRECISION_BITS, Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord
from targets import _board, _estimate, _qnn_worker, _venv
from targets._artifacts import check_chip, check_files, check_precision
from targets._compile import compiling
from targets._constraints import Table
from targets._qnn_constraints import TABLE

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "available", "build", "constraints", "install", "open"]

NAME = "qnn"
CAPABILITIES = Capabilities(
    layout="tokens",
    opset=20,
    precisions=("w8a16", "w8a8"),
    gelu="node",
    qdq="none",
    batch="static",
)
# QNN's numbers of the chips, (soc_model, htp_arch)
CHIPS = {"sm8650": ("57", "75"), "sm8550": ("43", "73"), "x-elite": ("60", "73"), "qcs6490": ("35", "68")}
LIMITS = _venv.Limits(seconds=1800)
SCRIPT = Path(__file__).with_name("_qnn_worker.py")
RECIPE = _venv.Recipe(
    name=NAME,
    python="",
    steps=(("onnxruntime-qnn==2.7.0", "onnx"),),
    module="onnxruntime_qnn",
    package="onnxruntime-qnn",
)
KNOWN = {
    "GLIBC_2.3": "The wheel needs glibc 2.35 or newer: Debian 12, Ubuntu 22.04 or later.",
    "No space left": "Free some disk space.",
}
BOARD = "onnxruntime_qnn"


def _worker(log: Path | None = None) -> _venv.Worker:
    return _venv.Worker(RECIPE, SCRIPT, log, LIMITS, KNOWN)


def available() -> Availability:
    """Whether this is a device, or the compiler's environment is installed; starts nothing."""
    return _board.availability(RECIPE, BOARD)


def on_board() -> bool:
    """Whether `open` runs on the chip here, not in the emulator."""
    return bool(_board.present(BOARD))


def install(say: Callable[[str], None]) -> Path:
    """Create the compiler's environment (about 0.5 GB); `say` gets one sentence per step.

    Raises:
        TargetUnavailable: pip failed.
    """
    return _venv.install(RECIPE, say)


def constraints(chip: str = "") -> Table:
    """What keeps an operation off the HTP of `chip`, with sources; needs no vendor tool.

    Raises:
        ConfigError: the chip is unknown.
    """
    check_chip(NAME, CHIPS, chip)
    return TABLE


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """An ONNX file that holds one context node, its binary for the chip, the estimate and the log.

    ``options.chip`` is sm8650 (8 Gen 3, the default), sm8550 (8 Gen 2), x-elite or qcs6490.

    Raises:
        ConfigError: the precision or chip is unknown, or there are no calibration images.
        TargetUnavailable: the compiler is not installed, failed, or took too long.
    """
    check_precision(NAME, CAPABILITIES, options)
    chip = check_chip(NAME, CHIPS, options.chip)
    with compiling(NAME, _worker, graph, options) as job:
        arguments = {
            "onnx": str(job.onnx),
            "name": options.name,
            "input": graph.graph.inputs[0].name,
            "activation_bits": PRECISION_BITS[options.precision][1],
            "provider": dict(zip(("soc_model", "htp_arch"), CHIPS[chip], strict=True)),
        }
        reply = job.compile(arguments)
        files = tuple(Path(shutil.copyfile(name, options.out_dir / Path(name).name)) for name in reply["files"])
    return job.artifact(files, _placement(reply, graph, chip), {"chip": chip})


def open(artifact: Artifact, threads: int = 1) -> QnnSession | _board.OnBoard:
    """`artifact` on the chip, on a device; elsewhere the HTP emulator on this CPU, at no meaningful speed.

    Raises:
        TargetUnavailable: the environment is not installed, or the device does not take the context.
        BundleError: a file is missing or changed.
    """
    del threads  # Unused: the chip and the emulator decide
    check_files(artifact)
    return _board.OnBoard(artifact, BOARD, _context(artifact)) if on_board() else QnnSession(artifact)


def _context(artifact: Artifact) -> _board.Infer:
    """One inference through ONNX Runtime's QNN provider, float32 in and out; the context quantizes."""
    try:
        session = _qnn_worker.session(str(artifact.path.resolve()), {}, {})
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        hint = f"It was built for {artifact.settings.get('chip', next(iter(CHIPS)))}."
        raise TargetUnavailable(f"{BOARD}: must load {artifact.path.name}, got {got}.", hint=hint) from error
    feed, output = artifact.inputs[0].name, artifact.outputs[0].name

    def infer(image: Array) -> object:
        return session.run([output], {feed: image})[0]

    return infer


class QnnSession(_estimate.Estimated):
    """A process that emulates one context."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._worker = _worker()
        self._worker.call("load", {"model": str(artifact.path.resolve())})

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; the context's batch is one, so images are emulated one after the other."""
        return self._worker.call("run", {}, inputs)[1]


def _placement(reply: Mapping[str, Any], graph: onnx_ir.Model, chip: str) -> _estimate.Estimate:
    """What is a node of its own beside the context nodes stayed on the CPU; everything else is inside them."""
    outside = {name: kind for name, kind in reply["nodes"] if kind != "EPContext"}
    contexts = tuple({"name": name} for name, kind in reply["nodes"] if kind == "EPContext")
    inside = [
        (n, k) for n, k in reply["quantized"] if n not in outside and k not in ("QuantizeLinear", "DequantizeLinear")
    ]
    ops = tuple(OpRecord(n, k, "NPU", reply["precision"], 0.0) for n, k in inside)
    ops += tuple(OpRecord(n, k, "CPU", "", 0.0) for n, k in outside.items())
    return _estimate.Estimate(
        estimator=f"onnxruntime-qnn partitioning for {chip}",
        leaves_out="all times: the emulator gives none of the chip's",
        latency_ms=None,
        subgraphs=contexts,
        ops=ops,
        npu_mac_share=_estimate.mac_share(_estimate.macs_by_node(graph), ops),
    )
