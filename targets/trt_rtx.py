"""TensorRT-RTX: engines for RTX GPUs, built and checked on any x86 machine without one.

The builder is the vendor's, with TensorRT's own ONNX parser: a graph it parses and builds is one the family accepts. It runs
in an environment of its own (``vitrim doctor --install tensorrt-rtx``). What it proves is parsing, building and the layers
of the engine; speed needs a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.types import Artifact, Availability, BuildOptions
from targets import _tensorrt, _venv
from targets._tensorrt import CAPABILITIES, EngineSession

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "RECIPE", "available", "build", "build_engine", "check", "install", "open", "plan"]

NAME = "tensorrt-rtx"
PACKAGE = "tensorrt_rtx_bindings"
RELEASE = "1.7.1.116"
WHEELS = (f"tensorrt_rtx_cu12_libs=={RELEASE}", f"tensorrt_rtx_cu12_bindings=={RELEASE}")
# The package of the plain name downloads from the vendor while it installs; the two it would fetch are ordinary wheels.
RECIPE = _venv.Recipe(
    NAME,
    "",
    (("numpy>=1.26",), ("--no-deps", "--only-binary=:all:", *WHEELS)),
    module=f"tensorrt_rtx_libs, {PACKAGE}",
    package="tensorrt_rtx_cu12_bindings",
)
FIX = f"On the machine with the GPU: pip install --no-deps {' '.join(WHEELS)}"
CHECKED = "SM89"  # has every precision; the first chip that has
WORKER = Path(__file__).with_name("_tensorrt_worker.py")


def available() -> Availability:
    """Whether engines can be built here: the package is installed, or its environment is, which runs nothing."""
    if find_spec(PACKAGE) is not None:
        try:
            found = version(RECIPE.package)
        except PackageNotFoundError as error:
            reason = f"{PACKAGE} is installed, but not as {RECIPE.package}: {error}"
            return Availability(available=False, reason=reason, fix=FIX)
        return Availability(available=True, version=found, runs=_tensorrt.gpus() > 0)
    return replace(_venv.availability(RECIPE), runs=False)


def install(say: Callable[[str], None]) -> Path:
    """Create the builder's environment (about 300 MB); `say` gets one sentence per step.

    Raises:
        TargetUnavailable: pip failed; the log is kept beside the environment.
    """
    return _venv.install(RECIPE, say)


def plan(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """The strongly typed graph under ``options.out_dir``, to be made an engine by `build_engine`; needs no vendor library."""
    return _tensorrt.plan(NAME, graph, options)


def build_engine(artifact: Artifact, out_dir: Path) -> Artifact:
    """The engine of build plan `artifact`, for the chip it names, or for every chip from Ampere on.

    Raises:
        TargetUnavailable: TensorRT-RTX is not installed, or refused; the log is kept beside the engine.
    """
    settings = {"package": PACKAGE, "timing_cache": "", "portable": ""}
    if find_spec(PACKAGE) is not None:
        return _tensorrt.build_engine(artifact, out_dir, settings, _tensorrt.here(NAME, FIX))
    out_dir.mkdir(parents=True, exist_ok=True)
    with _venv.Worker(RECIPE, WORKER, out_dir / f"{artifact.path.stem}.log") as worker:
        return _tensorrt.build_engine(artifact, out_dir.resolve(), settings, worker.call)


def check(artifact: Artifact, chip: str = "") -> dict[str, str]:
    """What build plan `artifact` becomes for `chip`, by default SM89; the engine is thrown away.

    Returns:
        ``builder``, ``chip``, and `targets._tensorrt.findings`.

    Raises:
        TargetUnavailable: TensorRT-RTX is not installed, or refused.
    """
    chip = chip or CHECKED
    with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
        made = build_engine(replace(artifact, settings={**artifact.settings, "chip": chip}), Path(folder))
        found = {name: value for name, value in made.settings.items() if name not in ("stage", "version", "batch")}
    return {"builder": f"{NAME} {made.settings['version']}", **found}


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """An engine under ``options.out_dir`` for ``options.chip`` ("SM89", ...; empty: every chip from Ampere on).

    Its settings say what became of the graph: see `targets._tensorrt.findings`.

    Raises:
        ConfigError: TensorRT-RTX does not run ``options.precision``.
        TargetUnavailable: TensorRT-RTX is not installed, or refused.
    """
    with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
        planned = plan(graph, BuildOptions(Path(folder), options.precision, options.name, chip=options.chip))
        return build_engine(planned, options.out_dir)


def open(artifact: Artifact, threads: int = 1) -> EngineSession:
    """A session on this machine's GPU; `threads` has no meaning there.

    Raises:
        TargetUnavailable: there is no GPU or no TensorRT-RTX in this Python: a session in another process would be timed with
            the exchange of its inputs and outputs, so there is none.
    """
    del threads  # Unused
    return EngineSession(artifact, PACKAGE, _tensorrt.here(NAME, FIX))
