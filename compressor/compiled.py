"""Chips that are not here: compiled by the vendor's tool, proven on its simulator, timed by its estimate or not at all.

A simulator's speed says nothing about the chip, so these targets never race; what is reported is the vendor's estimate,
named as one, with what it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import targets
from compressor.candidates import Contest, build, logits, precisions
from compressor.errors import ConfigError
from compressor.types import Array, Artifact, BuildOptions, Parity
from compressor.verify import check_parity
from targets import _estimate

__all__ = ["Compiled", "compile_model", "fallbacks", "is_compiled", "require_compilers", "to_json"]


@dataclass(frozen=True)
class Compiled:
    """One target's artifact, its parity on the simulator over the golden inputs, and the compiler's account of it."""

    artifact: Artifact
    parity: Parity
    golden: Array  # (8, classes), from the simulator
    estimate: _estimate.Estimate


def is_compiled(name: str) -> bool:
    """Whether target `name` is a vendor compiler with a simulator: it has an environment of its own and no build plan."""
    target = targets.get(name)
    return hasattr(target, "install") and not hasattr(target, "plan")


def compile_model(job: Contest, name: str, wanted: str, out_dir: Path) -> Compiled:
    """`job.model` compiled for target `name` in the last precision that ``--precision wanted`` admits.

    The vendor's tool quantizes by itself, calibrated on `job.pixels`.

    Raises:
        TargetUnavailable: the compiler failed; the sentence names the cause.
        ParityError: its simulator computes something else.
    """
    precision = precisions(name, wanted)[-1 if wanted != "auto" else 0]
    batches = tuple(np.array_split(job.pixels, len(job.pixels)))
    artifact = build(job.model, name, BuildOptions(out_dir, precision, precision, calibration=batches))
    session = targets.get(name).open(artifact)
    got = logits(session, artifact, job.golden)
    parity = check_parity(job.expected[: len(got)], got, precision, f"{name} {precision}, simulated")
    return Compiled(artifact, parity, got, _estimate.read(artifact))


def to_json(done: Compiled) -> dict[str, Any]:
    """An entry of ``compiled`` in the ``vitrim compress --json`` object."""
    account = {k: v for k, v in done.estimate.to_json().items() if k != "ops"}
    return {
        "name": done.artifact.target,
        "precision": done.artifact.precision,
        "size_bytes": done.artifact.size_bytes,
        "parity": {**asdict(done.parity), "agreement": 100 * done.parity.agreement},
        **account,
    }


def fallbacks(compiled: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each entry of ``compiled`` whose compiler left operations to the CPU."""
    told = []
    for entry in compiled:
        if entry["cpu_ops"]:
            first, *others = entry["cpu_ops"]
            which = f"{first['name']} ({first['type']})" + (f" and {len(others)} more" if others else "")
            told.append(f"{entry['name']}: on the CPU, not the NPU: {which}.")
    return told


def require_compilers(names: Sequence[str]) -> None:
    """Raise ConfigError unless one of the targets `names` has a compiler that reports where operations run."""
    if not any(is_compiled(name) for name in names):
        known = ", ".join(name for name in targets.names() if is_compiled(name))
        raise ConfigError(
            f"--require-npu must go with a target for an NPU ({known}), got {', '.join(names) or 'none'}."
        )
