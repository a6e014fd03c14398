"""What targets share whose compiler is a vendor's: one build, from a graph and calibration images to a described artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import ConfigError
from compressor.types import Artifact, BuildOptions, TensorSpec
from targets import _estimate, _venv
from targets._artifacts import describe

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Build", "Start", "compiling", "flat"]


Start = Callable[[Path | None], _venv.Worker]  # starts the tool's worker, which logs to the file given


@dataclass(frozen=True)
class Build:
    """One build under way: the graph as a file, and the worker that compiles it until the build ends."""

    target: str
    graph: onnx_ir.Model
    options: BuildOptions
    worker: _venv.Worker
    onnx: Path
    log: Path

    def compile(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker's ``compile`` answers, given the calibration images as one array (n, C, h, w)."""
        calibration = {"calibration": np.concatenate(self.options.calibration)}
        return self.worker.call("compile", dict(arguments), calibration)[0]

    def save(self, graph: onnx_ir.Model, name: str) -> Path:
        """Another graph as a file beside the one that is built."""
        return _save(graph, self.onnx.with_name(f"{name}.onnx"))

    def artifact(self, files: tuple[Path, ...], estimate: _estimate.Estimate, settings: Mapping[str, str]) -> Artifact:
        """The record of `files`, the main one first, with the estimate and the compiler's log beside them."""
        stored = _estimate.write(estimate, self.options.out_dir / f"{self.options.name}.estimate.json")
        return describe(self.target, self.graph, self.options, (*files, stored, self.log), settings)


@contextmanager
def compiling(target: str, start: Start, graph: onnx_ir.Model, options: BuildOptions) -> Iterator[Build]:
    """A build of `graph` for `target` by the worker that `start` starts; what it writes lasts until the build ends.

    Raises:
        ConfigError: there are no calibration images.
        TargetUnavailable: the tool is not installed, failed, or took too long.
    """
    if not options.calibration:
        raise ConfigError(f"BuildOptions.calibration must hold at least one batch for target {target!r}, got none.")
    options.out_dir.mkdir(parents=True, exist_ok=True)
    log = options.out_dir / f"{options.name}.build.log"
    with TemporaryDirectory(prefix="vitrim-") as folder, start(log) as worker:
        yield Build(target, graph, options, worker, _save(graph, Path(folder) / "model.onnx"), log)


def _save(graph: onnx_ir.Model, file: Path) -> Path:
    import onnx_ir

    file.write_bytes(onnx_ir.to_proto(graph).SerializeToString(deterministic=True))
    return file


def flat(artifact: Artifact) -> Artifact:
    """`artifact` of a graph whose logits are a map (B, classes, 1, 1), promising them as (B, classes)."""
    return replace(artifact, outputs=tuple(TensorSpec(o.name, o.dtype, o.shape[:2]) for o in artifact.outputs))
