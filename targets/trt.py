"""TensorRT 10 and 11: a build plan made anywhere, an engine made on the machine with the GPU.

TensorRT's builder times kernels on the GPU it builds for, and its libraries come from the vendor (Jetson: with JetPack). So
`plan` writes the strongly typed graph where the model is compressed, and `build_engine` makes the engine where it will run.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.types import Artifact, Availability, BuildOptions
from targets import _runtime, _tensorrt, trt_rtx
from targets._artifacts import check_chip
from targets._tensorrt import CAPABILITIES, EngineSession

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "available", "build", "build_engine", "check", "open", "plan"]

NAME = "tensorrt"
PACKAGE = "tensorrt"
PORTABLE = {"ampere+": "hardware", "version+": "version"}
FIX = "On the machine with the GPU: pip install 'vitrim[tensorrt]' (Jetson: TensorRT comes with JetPack)"


def available() -> Availability:
    """Whether TensorRT can be imported, and runs: has a GPU here. Without it there are still build plans."""
    state = _runtime.loads(PACKAGE, FIX)
    return replace(state, runs=_tensorrt.gpus() > 0) if state.available else state


def plan(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """The strongly typed graph under ``options.out_dir``, to be made an engine by `build_engine`; needs no vendor library.

    Raises:
        ConfigError: the chip is neither empty, "ampere+" nor "version+", or see `targets._tensorrt.plan`.
    """
    portable(options.chip)
    return _tensorrt.plan(NAME, graph, options)


def check(artifact: Artifact, chip: str = "") -> dict[str, str]:
    """What build plan `artifact` becomes for RTX chip `chip`, by TensorRT-RTX, whose parser is the same: see `trt_rtx.check`."""
    return trt_rtx.check(artifact, chip)


def build_engine(artifact: Artifact, out_dir: Path) -> Artifact:
    """The engine of build plan `artifact` for the GPU of this machine.

    Kernel timings are kept in `timings` and reused. A plan whose chip is "ampere+" makes an engine for every GPU from Ampere
    on, "version+" one that later TensorRT releases load too; both cost speed.

    Raises:
        ConfigError: the chip is neither empty, "ampere+" nor "version+".
        TargetUnavailable: TensorRT is not installed, or refused.
    """
    chip = artifact.settings.get("chip", "")
    settings = {"package": PACKAGE, "timing_cache": str(timings()), "portable": portable(chip)}
    return _tensorrt.build_engine(artifact, out_dir, settings, _tensorrt.here(NAME, FIX))


def portable(chip: str) -> str:
    """How portable an engine for `chip` is: "" (this GPU and release only), "hardware" or "version"."""
    return PORTABLE[check_chip(NAME, PORTABLE, chip)] if chip else ""


def timings() -> Path:
    """``$XDG_CACHE_HOME/vitrim/tensorrt.timings``, by default in ``~/.cache``: how long kernels took in earlier builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrim" / "tensorrt.timings"


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """An engine under ``options.out_dir`` for the GPU of this machine.

    Raises:
        ConfigError: TensorRT does not run ``options.precision``.
        TargetUnavailable: TensorRT is not installed, or refused.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
        planned = plan(graph, BuildOptions(Path(folder), options.precision, options.name, chip=options.chip))
        return build_engine(planned, options.out_dir)


def open(artifact: Artifact, threads: int = 1) -> EngineSession:
    """A session on this machine's GPU; `threads` has no meaning there.

    Raises:
        TargetUnavailable: TensorRT is not installed, there is no GPU, or `artifact` is a build plan.
    """
    del threads  # Unused
    return EngineSession(artifact, PACKAGE, _tensorrt.here(NAME, FIX))
