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

__all__ = [
    "Compiled",
    "compile_model",
    "estimated_profile",
    "fallbacks",
    "is_compiled",
    "is_simulated",
    "require_compilers",
    "to_json",
]


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


def is_simulated(name: str) -> bool:
    """Whether what runs here for target `name` is a simulator, whose time means nothing; on the chip's own board it is not."""
    on_board = getattr(targets.get(name), "on_board", lambda: False)
    return is_compiled(name) and not on_board()


def compile_model(job: Contest, name: str, wanted: str, out_dir: Path) -> Compiled:
    """`job.model` compiled for target `name` in the precision `wanted`, or for ``auto`` in the first that the target has.

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
        "settings": dict(done.artifact.settings),
        "parity": {**asdict(done.parity), "agreement": 100 * done.parity.agreement},
        **account,
    }


def estimated_profile(artifact: Artifact, *, threads: int, per_op: bool) -> dict[str, Any]:
    """The ``vitrim profile --json`` object of an artifact that only a simulator runs here: its compiler's account, no timing.

    The keys of a measured profile, null or empty where nothing was measured, and ``estimated`` (true), ``estimator``,
    ``leaves_out``, ``cpu_ops``, ``npu_mac_share``, ``subgraphs``. A modelled latency is both median and mean, and has no spread.

    Raises:
        BundleError: the artifact has no readable estimate.
    """
    estimate = _estimate.read(artifact)
    account = {k: v for k, v in estimate.to_json().items() if k not in ("ops", "latency_ms")}
    ms = estimate.latency_ms
    spread = dict.fromkeys(("min", "p90", "p99"))
    return {
        "target": artifact.target,
        "precision": artifact.precision,
        "device": {"chip": artifact.settings.get("chip", "")},
        "runs": 0,
        "warmup": 0,
        "threads": threads,
        "batch": artifact.inputs[0].shape[0],
        "latency_ms": None if ms is None else {**spread, "p50": ms, "mean": ms},
        "images_per_s": None if ms is None else 1e3 / ms,
        **dict.fromkeys(("latency_ci95_ms", "load_ms", "first_run_ms", "peak_rss_bytes")),
        "samples_ns": [],
        "yardstick_ns": [],
        "conditions": {},
        "parts": [],
        "ops": [{**asdict(op), "share": 0.0} for op in estimate.ops] if per_op else [],
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
