"""Where the candidates of one target race: on this machine, or all of them on a device (`compress --device`).

A race answers with times taken in turns (see `profile.interleave`), the nodes each artifact ran, and the fingerprint of the
machine, so that "faster or revert" is decided by the machine the bundle is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import targets
from compressor.device import fingerprint
from compressor.errors import ParityError
from compressor.manifest import TargetEntry, artifact_entry, artifact_of
from compressor.profile import ProfileConfig, interleave
from compressor.types import Array, Artifact, OpRecord, Session
from compressor.verify import tolerance

__all__ = ["Inputs", "Race", "Raced", "packed", "race_here", "race_there"]

FOLDER = Path("race")
TENSORS = FOLDER / "tensors.npz"
Inputs = Mapping[str, Array]


@dataclass(frozen=True)
class Raced:
    """What a race found.

    Attributes:
        samples_ns: of each artifact; sample r of every one is from the same round.
        ops: the nodes that an artifact ran, by its name.
        device: fingerprint of the machine that raced them.
    """

    samples_ns: Mapping[str, tuple[int, ...]]
    ops: Callable[[str], tuple[OpRecord, ...]]
    device: Mapping[str, Any]


class Race(Protocol):
    """Runs the artifacts of one target against each other; `sessions` are open here already."""

    def __call__(
        self, artifacts: Mapping[str, Artifact], sessions: Mapping[str, Session], inputs: Inputs, config: ProfileConfig
    ) -> Raced:
        """What the race found."""


def race_here(
    artifacts: Mapping[str, Artifact], sessions: Mapping[str, Session], inputs: Inputs, config: ProfileConfig
) -> Raced:
    """The race on this machine."""
    del artifacts  # Unused: they are open already
    times = interleave(sessions, inputs, config)
    return Raced(times, lambda name: sessions[name].ops(inputs), fingerprint())


def race_there(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The race that `packed` describes, in the current folder: a job of `compressor.runner`.

    Raises:
        ParityError: an artifact computes something else here than where it was built.
    """
    target, config = targets.get(arguments["target"]), ProfileConfig(**arguments["config"])
    entries = {name: TargetEntry.model_validate(entry) for name, entry in arguments["artifacts"].items()}
    artifacts = {name: artifact_of(target.NAME, entry, Path.cwd()) for name, entry in entries.items()}
    with np.load(TENSORS, allow_pickle=False) as stored:
        inputs = {key.removeprefix("input."): stored[key] for key in stored.files if key.startswith("input.")}
        expected = {name: stored[f"expected.{i}"] for i, name in enumerate(artifacts)}
    sessions = {name: target.open(artifact, threads=config.threads) for name, artifact in artifacts.items()}
    for name, artifact in artifacts.items():
        got, limit = sessions[name].run(inputs)[artifact.outputs[0].name], tolerance(expected[name], artifact.precision)
        off = float(np.abs(got - expected[name]).max())
        if not off <= limit:  # NaN is not
            raise ParityError(f"{target.NAME} {name}: outputs there must be within {limit:.2g} of here, got {off:.3g}.")
    times = interleave(sessions, inputs, config)
    ops = {name: [asdict(op) for op in session.ops(inputs)] for name, session in sessions.items()}
    versions = {target.NAME: target.available().version}
    return {"samples_ns": {n: list(t) for n, t in times.items()}, "ops": ops, "device": fingerprint(versions)}


def packed(
    artifacts: Mapping[str, Artifact], expected: Mapping[str, Array], inputs: Inputs, folder: Path
) -> tuple[dict[str, Path], dict[str, Any]]:
    """What `race_there` needs: files by their name there, and the artifacts' entries. Tensors are written to `folder`."""
    tensors: dict[str, Any] = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {f"expected.{i}": expected[name] for i, name in enumerate(artifacts)}
    np.savez(folder / TENSORS.name, **tensors)
    files, entries = {TENSORS.as_posix(): folder / TENSORS.name}, {}
    for i, (name, artifact) in enumerate(artifacts.items()):
        own = artifact.files or (artifact.path,)
        moved = {file: FOLDER / str(i) / file.name for file in own}
        files |= {there.as_posix(): file for file, there in moved.items()}
        named = replace(artifact, path=moved[artifact.path], files=tuple(moved.values()))
        entries[name] = artifact_entry(named, Path()).model_dump()
    return files, entries
