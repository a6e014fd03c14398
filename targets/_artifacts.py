"""What every target file shares: describing and checking the files of an artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import BundleError, ConfigError
from compressor.types import Artifact, BuildOptions, Capabilities, TensorSpec

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["check_chip", "check_files", "check_precision", "describe", "tensor_specs"]

BLOCK = 1 << 20


def digest(files: tuple[Path, ...]) -> str:
    """sha256 of the contents of `files`, one after the other; of one file, its plain sha256."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                total.update(block)
    return total.hexdigest()


def tensor_specs(values: object) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of graph inputs or outputs; -1 for the free batch axis."""
    specs = []
    for value in values:  # type: ignore[attr-defined]
        shape = tuple(dim if isinstance(dim, int) else -1 for dim in value.shape)
        specs.append(TensorSpec(value.name, str(value.dtype.numpy()), shape))
    return tuple(specs)


def describe(
    target: str, graph: onnx_ir.Model, options: BuildOptions, files: tuple[Path, ...], settings: Mapping[str, str]
) -> Artifact:
    """The record of an artifact whose main file is the first of `files`."""
    size = sum(file.stat().st_size for file in files)
    inputs, outputs = tensor_specs(graph.graph.inputs), tensor_specs(graph.graph.outputs)
    return Artifact(target, files[0], digest(files), size, options.precision, inputs, outputs, settings, files)


def check_precision(target: str, capabilities: Capabilities, options: BuildOptions) -> None:
    """Raises ConfigError when the target does not build `options.precision`."""
    known = (*capabilities.precisions, *capabilities.narrow)
    if options.precision not in known:
        raise ConfigError(
            f"Precision of target {target!r} must be one of {', '.join(known)}, got {options.precision!r}."
        )


def check_chip(target: str, known: Iterable[str], chip: str) -> str:
    """`chip`, or the first of `known` when it is empty; raises ConfigError when the target does not know it."""
    names = tuple(known)
    if chip and chip not in names:
        raise ConfigError(f"The chip of target {target!r} must be one of {', '.join(names)}, got {chip!r}.")
    return chip or names[0]


def check_files(artifact: Artifact) -> None:
    """Raises BundleError when a file of `artifact` is missing or its contents changed."""
    files = artifact.files or (artifact.path,)
    for file in files:
        if not file.is_file():
            raise BundleError(
                f"{file}: artifact of target {artifact.target!r} must be a file, got nothing there.",
                hint="Build it again.",
            )
    found = digest(files)
    if found != artifact.sha256:
        raise BundleError(
            f"{artifact.path}: artifact of target {artifact.target!r} must have sha256 {artifact.sha256}, got {found}.",
            hint="The file was changed or damaged after it was built; build it again.",
        )
