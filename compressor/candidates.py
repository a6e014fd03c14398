"""Faster or revert: what a target could run, built, proven and raced side by side; the fastest that still agrees is kept.

Everything is measured on the target in one interleaved race with the unpruned float model, so that a busy machine slows
all of them alike. A slower result is never handed back silently: the outcome is a field of the result with its sentence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import targets
from compressor.errors import ConfigError, TargetUnavailable
from compressor.profile import ProfileConfig, faster
from compressor.race import Race, race_here
from compressor.types import (
    WEIGHT_ONLY,
    Array,
    Artifact,
    BuildOptions,
    Model,
    OpRecord,
    Parity,
    Precision,
    Quantization,
    Session,
    latency_ms,
)
from compressor.verify import check_parity

if TYPE_CHECKING:
    from compressor.quantize.refine import Refined  # torch is not part of a device install

__all__ = [
    "Candidate",
    "Outcome",
    "build",
    "choose",
    "contest",
    "discard",
    "logits",
    "open_model",
    "precisions",
    "require",
]

FLOAT: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
RACE_SECONDS = 4.0  # of each contestant's share of an interleaved race


def require(name: str) -> None:
    """Raise TargetUnavailable, with the command that fixes it, unless target `name` can run here."""
    state = targets.get(name).available()
    if not state.available:
        raise TargetUnavailable(
            f"Target {name!r} is not available: {state.reason}", hint=f"Install it: {state.fix}" if state.fix else ""
        )


def precisions(name: str, wanted: str) -> tuple[Precision, ...]:
    """What target `name` should try for ``--precision wanted``: always fp32, to fall back on, then what was asked for.

    Raises:
        ConfigError: the target cannot run `wanted`.
    """
    form = targets.get(name).CAPABILITIES
    known = (*form.precisions, *form.narrow)
    if wanted == "auto":
        return form.precisions
    if wanted not in known:
        raise ConfigError(f"precision must be one of {', '.join(known)} or auto for target {name!r}, got {wanted!r}.")
    first: Precision = "fp32" if "fp32" in known else known[0]
    return tuple(dict.fromkeys((first, next(p for p in known if p == wanted))))


def build(model: Model, name: str, options: BuildOptions, quantization: Quantization | None = None) -> Artifact:
    """`model` as an artifact of target `name` in ``options.out_dir``; `quantization` is used when the precision has integers."""
    from compressor.lower import lower  # onnx-ir is not part of a device install

    target = targets.get(name)
    integer = options.precision not in FLOAT
    own = integer and options.quantizer == "vitrim"
    graph = lower(model, target.CAPABILITIES, quantization if own else None)
    return target.build(graph, options)


def logits(session: Session, artifact: Artifact, pixels: Array, batch: int = 50) -> Array:
    """(n, C, h, w) -> (n, classes), in batches, or one by one where the artifact's batch is fixed."""
    size = batch if artifact.inputs[0].shape[0] == -1 else artifact.inputs[0].shape[0]
    feed, out = artifact.inputs[0].name, artifact.outputs[0].name
    return np.concatenate([session.run({feed: pixels[i : i + size]})[out] for i in range(0, len(pixels), size)])


def open_model(model: Model, name: str, threads: int, stack: ExitStack) -> tuple[Callable[[], Session], Artifact]:
    """What opens a float session of `model` on target `name`; its files live as long as `stack`."""
    require(name)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitrim-")))
    artifact = build(model, name, BuildOptions(folder))
    return partial(targets.get(name).open, artifact, threads=threads), artifact


@dataclass(frozen=True)
class Candidate:
    """One way to run the model on one target: built, proven against the float model, and raced.

    `label` is the precision, ``-scores`` where q k^T runs in integers too, and the settings that differ where the same
    files can be run in several ways.
    """

    label: str
    artifact: Artifact
    parity: Parity
    samples_ns: tuple[int, ...]
    golden: Array  # (8, classes)

    @property
    def p50(self) -> float:
        """Median latency in milliseconds."""
        return latency_ms(self.samples_ns)["p50"]


@dataclass(frozen=True)
class Outcome:
    """All candidates of one target and which was kept, with the sentence that says why."""

    target: str
    kept: Candidate
    candidates: tuple[Candidate, ...]
    reference_ns: tuple[int, ...]
    reverted: bool
    reason: str
    ops: tuple[OpRecord, ...]
    reference_ops: tuple[OpRecord, ...]
    device: Mapping[str, Any]  # fingerprint of the machine that raced them


@dataclass(frozen=True)
class Contest:
    """What every target's contest is about.

    Args:
        reference: the unpruned float model.
        model: the compressed float model.
        expected: (n, classes) logits of `model` on `pixels`.
        pixels: (n, C, h, w) calibration inputs for parity; never evaluation images.
        golden: (8, C, h, w).
        quantizations: by precision, as the target wants them.
        threads: of every session.
        quantizer: whose integers; ``nncf`` only where the target offers it.
        min_agreement: percent of classes that a candidate must share with `model` to be eligible.
        race: where the artifacts run against each other.
    """

    reference: Model
    model: Model
    expected: Array
    pixels: Array
    golden: Array
    quantizations: Mapping[Precision, Refined] = field(default_factory=dict)
    threads: int = 1
    quantizer: Literal["vitrim", "nncf"] = "vitrim"
    min_agreement: float = 98.0
    race: Race = race_here


def contest(job: Contest, name: str, wanted: str, out_dir: Path) -> Outcome:
    """Build, prove and race every precision of target `name`; the fastest eligible one is kept.

    Raises:
        ParityError: a built artifact computes something else.
    """
    target = targets.get(name)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitrim-")))
        reference = build(job.reference, name, BuildOptions(folder, name="reference"))
        artifacts = _artifacts(job, name, wanted, out_dir)
        sessions = {"reference": target.open(reference, threads=job.threads)}
        sessions |= {label: target.open(artifact, threads=job.threads) for label, artifact in artifacts.items()}
        feed = {reference.inputs[0].name: job.golden[:1]}
        timing = ProfileConfig(threads=job.threads, budget_s=RACE_SECONDS * len(sessions))
        proven = {
            label: _prove(job, label, sessions[label], a) for label, a in artifacts.items()
        }  # before anything is timed
        raced = job.race({"reference": reference, **artifacts}, sessions, feed, timing)
        times = raced.samples_ns
        candidates = tuple(Candidate(n, a, proven[n][0], times[n], proven[n][1]) for n, a in artifacts.items())
        kept, reverted, reason = choose(candidates, wanted, job.min_agreement)
        ops, before = raced.ops(kept.label), raced.ops("reference")
    discard(candidates, kept)
    return Outcome(name, kept, candidates, times["reference"], reverted, reason, ops, before, raced.device)


def discard(candidates: tuple[Candidate, ...], kept: Candidate) -> None:
    """Delete the files of every candidate but `kept`; several candidates may be the same files under other settings."""
    for file in {f for c in candidates for f in c.artifact.files} - set(kept.artifact.files):
        file.unlink()


def _artifacts(job: Contest, name: str, wanted: str, out_dir: Path) -> dict[str, Artifact]:
    """Everything target `name` may run, by label: each precision, under each setting the target offers for it."""
    found: dict[str, Artifact] = {}
    for precision in precisions(name, wanted):
        calibration = tuple(np.array_split(job.pixels, max(1, len(job.pixels) // 8)))
        options = BuildOptions(out_dir, precision, precision, job.quantizer, calibration)
        refined = job.quantizations.get(precision)
        model = refined.model if refined else job.model
        for label, grids in _plans(refined, precision, name).items():
            artifact = build(model, name, replace(options, name=label), grids)
            for variant in targets.variants(name, artifact):
                changed = [f"{k}={v}" for k, v in variant.settings.items() if artifact.settings.get(k) != v]
                found[f"{label} ({', '.join(changed)})" if changed else label] = variant
    return found


def _plans(refined: Refined | None, precision: Precision, name: str) -> dict[str, Quantization | None]:
    """What of `precision` target `name` may run, by label: with q k^T in float, and in integers where that may pay."""
    if refined is None:
        return {precision: None}
    plans: dict[str, Quantization | None] = {precision: refined.quantization}
    if refined.scores and targets.get(name).CAPABILITIES.int8_scores:
        plans[f"{precision}-scores"] = refined.with_scores()
    return plans


def _prove(job: Contest, label: str, session: Session, artifact: Artifact) -> tuple[Parity, Array]:
    """Parity on the calibration inputs, which must hold, and the golden outputs."""
    got = logits(session, artifact, job.pixels)
    parity = check_parity(job.expected, got, artifact.precision, f"{artifact.target} {label}")
    return parity, np.concatenate([logits(session, artifact, x[None]) for x in job.golden])


def choose(candidates: tuple[Candidate, ...], wanted: str, min_agreement: float) -> tuple[Candidate, bool, str]:
    """The kept candidate, whether a requested or possible quantized one was dropped for it, and why.

    The first candidate, fp32, is kept unless another is faster with its whole 95 % interval. Integers for the weights alone
    are asked for the size of the file: they are kept however long they take, and the reason says how long.
    """
    base = candidates[0]
    if len(candidates) == 1:
        return base, False, f"{base.artifact.precision} was the only precision asked for."
    ratios = {c.label: faster(c.samples_ns, base.samples_ns) for c in candidates[1:]}
    named = [c for c in candidates[1:] if c.label.partition(" ")[0] == wanted]  # as asked for, whatever it answers
    exact = [c for c in candidates[1:] if 100 * c.parity.agreement >= min_agreement or c in named]
    small = [c for c in exact if c.artifact.precision in WEIGHT_ONLY]
    kept = min(small or [base, *(c for c in exact if ratios[c.label].is_faster)], key=lambda c: c.p50)
    told = [f"{base.label} {base.p50:.3g} ms"]
    for c in candidates[1:]:
        r = ratios[c.label]
        text = f"{c.label} {c.p50:.3g} ms ({r.ratio:.2f}x its time, 95 % interval {r.low:.2f} to {r.high:.2f})"
        told.append(text if c in exact else f"{text}, not eligible at {100 * c.parity.agreement:.1f} % agreement")
    reason = f"{kept.label} kept{', for its size' if small else ''}: " + "; ".join(told) + "."
    if wanted != "auto":
        return kept, kept.artifact.precision != wanted, reason
    return kept, kept.artifact.precision in FLOAT and any(c.artifact.precision not in FLOAT for c in candidates), reason
