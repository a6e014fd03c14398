"""Engines made where they run: a bundle carries a build plan, and ``vitrim build`` on the device completes it.

A builder that times kernels on its own GPU cannot run where the model is compressed. So a target may offer ``plan`` (the exact
graphs, one per precision, made anywhere) and ``build_engine`` (made on the device). There every plan is built, proven against
the golden logits and raced; the fastest that agrees is sealed into the bundle with its latency and the device's fingerprint.

Where the model is compressed a target may `check` its plans with a builder that needs no device: what became of every layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

import targets
from compressor.bundle import Bundle
from compressor.candidates import Candidate, choose, discard, logits, require
from compressor.device import fingerprint
from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.intervals import proportion_interval
from compressor.manifest import TargetEntry, artifact_entry, seal, sha256_file
from compressor.output import file_or_folder, write_json
from compressor.profile import ProfileConfig, interleave
from compressor.recipe import Recipe
from compressor.result import Result
from compressor.types import Array, Artifact, BuildOptions, Model, Precision, Session, latency_ms
from compressor.verify import check_parity, tolerance
from targets._artifacts import digest

if TYPE_CHECKING:
    import onnx_ir

    from compressor.quantize.refine import Refined

__all__ = [
    "BuildJob",
    "adopt",
    "build_bundle",
    "built",
    "check_bundle",
    "check_plan",
    "is_planned",
    "make_plan",
    "planner",
]

RACE_SECONDS = 4.0  # of each engine's share of the race


class Planner(Protocol):
    """What a target offers beside the usual when its engines are made on the device."""

    def plan(self, graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
        """The graph as the device's builder takes it, written under ``options.out_dir``."""
        ...

    def build_engine(self, artifact: Artifact, out_dir: Path) -> Artifact:
        """The engine of plan `artifact`, for the device this runs on."""
        ...


def is_planned(name: str) -> bool:
    """Whether target `name` offers plans and cannot run what it builds on this machine."""
    target = targets.get(name)
    if not hasattr(target, "plan"):
        return False
    state = target.available()
    return not (state.available and state.runs)


def planner(name: str) -> Planner:
    """Target `name`, which must offer plans.

    Raises:
        ConfigError: it has none: its artifacts are complete as `build` makes them.
    """
    target = targets.get(name)
    if not hasattr(target, "plan") or not hasattr(target, "build_engine"):
        raise ConfigError(
            f"target must be one with build plans, got {name!r}.",
            hint="Its artifacts are complete; nothing is left to build.",
        )
    return cast(Planner, target)


def make_plan(
    model: Model,
    name: str,
    precisions: tuple[Precision, ...],
    quantizations: Mapping[Precision, Refined],
    out_dir: Path,
) -> Artifact:
    """One plan of `model` for target `name` per precision, as one artifact; the first precision is the one to beat.

    Args:
        model: the compressed float model.
        name: of a target with plans.
        precisions: to choose among on the device.
        quantizations: by precision, for those with integers.
        out_dir: receives ``PRECISION.onnx``.
    """
    from compressor.lower import lower

    form, plans = targets.get(name).CAPABILITIES, []
    for p in precisions:
        refined = quantizations.get(p)
        graph = lower(refined.model, form, refined.quantization) if refined else lower(model, form)
        plans.append(planner(name).plan(graph, BuildOptions(out_dir, p, p)))
    files = tuple(plan.path for plan in plans)
    size = sum(plan.size_bytes for plan in plans)
    return replace(plans[0], files=files, sha256=digest(files), size_bytes=size)


def check_plan(planned: Artifact, chip: str = "") -> dict[str, Any]:
    """What a builder that needs no device makes of each precision of `planned` for `chip` (empty: the builder's choice).

    Returns:
        ``engines`` {precision: the target's findings}, ``refused`` {precision: why}.
    """
    target: Any = planner(planned.target)
    engines, refused = {}, {}
    for file in planned.files if hasattr(target, "check") else ():
        try:
            engines[file.stem] = dict(target.check(_single(planned, file, {}), chip))
        except (ConfigError, TargetUnavailable) as error:
            refused[file.stem] = str(error)
    return {"engines": engines, "refused": refused}


def check_bundle(path: Path, name: str, chip: str = "") -> Result:
    """`check_plan` of target `name` of the bundle at `path`, which is left as it is.

    Raises:
        BundleError: the bundle holds no plan for the target.
        TargetUnavailable: no precision could be built; most often the builder is not installed.
    """
    found = check_plan(_plan_of(Bundle.open(path), path, name), chip)
    if not found["engines"]:
        why = next(iter(found["refused"].values()), "the target has no builder that works without a device")
        raise TargetUnavailable(f"{path}: the plan of target {name!r} must build, got: {why}")
    lines = [f"{p}: {', '.join(f'{k} {v}' for k, v in e.items())}" for p, e in found["engines"].items()]
    return Result({"target": name, **found}, [*lines, *(f"{p}: refused: {why}" for p, why in found["refused"].items())])


def _plan_of(bundle: Bundle, path: Path, name: str) -> Artifact:
    planner(name)
    if name not in bundle.manifest.targets:
        raise BundleError(
            f"{path}: must hold a build plan for target {name!r}, got {', '.join(bundle.manifest.targets)}.",
            hint=f"Make one: vitrim compress MODEL --target {name} --out BUNDLE.",
        )
    planned = bundle.artifact(name)
    if planned.settings.get("stage") != "plan":
        raise BundleError(
            f"{path}: target {name!r} must be a build plan, got a built artifact.", hint="Run it as it is."
        )
    return planned


@dataclass(frozen=True)
class BuildJob:
    """Which plans are completed, and for what.

    Args:
        target: whose plans.
        chip: what the engines are for, as the target calls it; empty: this device.
        batch: images at a time that the engines are tuned for and raced with; they take others too.
        threads: CPU threads of the sessions.
    """

    target: str
    chip: str = ""
    batch: int = 1
    threads: int = 1

    @property
    def settings(self) -> dict[str, str]:
        """What the plan does not say."""
        return {"batch": str(self.batch)} | ({"chip": self.chip} if self.chip else {})


def build_bundle(path: Path, job: BuildJob, out: Path | None = None, *, force: bool = False) -> Result:
    """The bundle at `path` with the plans of a target replaced by the fastest engine that agrees, on this device.

    Args:
        path: a bundle folder or .zip.
        job: which target, and for what.
        out: the completed bundle; None replaces the one at `path`.
        force: whether `out` may exist.

    Raises:
        BundleError: the bundle holds no plan for the target.
        ConfigError: the target does not know the chip, or `out` may not be replaced.
        TargetUnavailable: the runtime is not installed here, or refused every precision.
        ParityError: an engine computes something else.
    """
    bundle, name = Bundle.open(path), job.target
    planned = _plan_of(bundle, path, name)
    require(name)
    goal = out or path
    with file_or_folder(goal, force=force or out is None, zipped=goal.suffix == ".zip") as folder:
        _copy(bundle, folder, bundle.manifest.files.keys() - _files_of(bundle, name))
        home = folder / "targets" / name
        engines, refused = _engines(planned, home, job.settings)
        kept, candidates, reason = _race(bundle, job, engines)
        discard(candidates, kept)
        found = {**_account(name, kept, candidates, reason), "batch": job.batch, "refused": refused}
        write_json(home / "build.json", found)
        _seal(bundle, folder, name, artifact_entry(kept.artifact, folder), kept.golden)
    return built(goal, found)


def built(goal: Path, found: Mapping[str, Any]) -> Result:
    """What ``vitrim build`` answers about the completed bundle at `goal`."""
    ms = found["latency_ms"]["p50"]
    per = f" per {found['batch']} images" if found["batch"] > 1 else ""
    lines = [f"{goal}: {found['target']} {found['precision']}, {ms:.3g} ms{per}", f"  {found['reason']}"]
    lines += [f"  {precision} is not for this device: {why}" for precision, why in found["refused"].items()]
    return Result({**found, "bundle": str(goal)}, lines)


def adopt(bundle: Bundle, complete: Bundle, name: str, folder: Path) -> None:
    """Fill the empty `folder` with `bundle`, its plans of target `name` completed by what a device made of them.

    Args:
        bundle: ours, with the plans.
        complete: what came back. Its files under ``targets/NAME``, its entry of that target and that target's golden
            outputs are taken over, nothing else.
        name: of the target.
        folder: to be sealed.

    Raises:
        BundleError: another file was changed there, or the engine is not among the target's files or has no outputs.
        ParityError: the outputs are not those of the model.
    """
    hint = "Nothing was taken over. Build on a device that you trust."
    ours, theirs = _others(bundle, name), _others(complete, name)
    changed = sorted(file for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file))
    if changed:
        raise BundleError(
            f"{name}: the device must leave other files as they were sent, got {changed[0]!r}.", hint=hint
        )
    entry, made = complete.manifest.targets.get(name), _files_of(complete, name)
    if entry is None or not {entry.path, *entry.files} <= made:
        raise BundleError(f"{name}: the device must put its engine under targets/{name}, got none there.", hint=hint)
    golden = complete.golden.get(f"outputs.{name}")
    if golden is None or golden.dtype.kind != "f":
        raise BundleError(f"{name}: the device must give its engine's golden outputs, got none.", hint=hint)
    check_parity(bundle.golden["reference"], golden, entry.precision, f"{name} {entry.precision}")
    _copy(bundle, folder, bundle.manifest.files.keys() - _files_of(bundle, name))
    _copy(complete, folder, made)
    _seal(bundle, folder, name, entry, golden)


def _files_of(bundle: Bundle, name: str) -> set[str]:
    """The listed files of target `name`."""
    return {file for file in bundle.manifest.files if PurePosixPath(file).is_relative_to(f"targets/{name}")}


def _others(bundle: Bundle, name: str) -> dict[str, str]:
    """sha256 of every listed file that a build for target `name` leaves as it is."""
    own = {"golden.npz", *_files_of(bundle, name)}
    return {file: entry.sha256 for file, entry in bundle.manifest.files.items() if file not in own}


def _copy(bundle: Bundle, folder: Path, files: Iterable[str]) -> None:
    """The listed `files` into `folder`: what else lies there, a link perhaps, is not of the bundle."""
    for file in files:
        goal = folder / file
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.root / file, goal)


def _single(planned: Artifact, file: Path, settings: Mapping[str, str]) -> Artifact:
    """The plan of one precision, which is the file's name, with `settings` added."""
    settings = {**planned.settings, **settings}
    size, digest = file.stat().st_size, sha256_file(file)
    one = replace(planned, path=file, files=(file,), sha256=digest, size_bytes=size, settings=settings)
    return replace(one, precision=cast(Precision, file.stem))


def _engines(planned: Artifact, home: Path, settings: Mapping[str, str]) -> tuple[list[Artifact], dict[str, str]]:
    """Every precision made an engine, and why not the others: not every device builds, or runs, every precision."""
    name = planned.target
    make, made = planner(name), []
    refusals: dict[str, ConfigError | TargetUnavailable] = {}
    for file in planned.files:
        before = set(home.glob("*"))
        try:
            engine = make.build_engine(_single(planned, file, settings), home)
            targets.get(name).open(engine)  # some leave the last step to the runtime, which then is the one to refuse
            made.append(engine)
        except (ConfigError, TargetUnavailable) as error:
            refusals[file.stem] = error
            for left in set(home.glob("*")) - before:
                left.unlink()
    if not made:
        raise next(iter(refusals.values()))
    return made, {precision: str(error) for precision, error in refusals.items()}


def _race(bundle: Bundle, job: BuildJob, engines: list[Artifact]) -> tuple[Candidate, tuple[Candidate, ...], str]:
    golden, expected, name = bundle.golden["inputs"], bundle.golden["reference"], job.target
    sessions: dict[str, Session] = {e.precision: targets.get(name).open(e, threads=job.threads) for e in engines}
    outputs = {
        e.precision: np.concatenate([logits(sessions[e.precision], e, x[None]) for x in golden]) for e in engines
    }
    parities = {
        e.precision: check_parity(expected, outputs[e.precision], e.precision, f"{name} {e.precision}") for e in engines
    }
    feed = {engines[0].inputs[0].name: np.resize(golden, (job.batch, *golden.shape[1:]))}
    times = interleave(sessions, feed, ProfileConfig(threads=job.threads, budget_s=RACE_SECONDS * len(sessions)))
    candidates = tuple(
        Candidate(e.precision, e, parities[e.precision], times[e.precision], outputs[e.precision]) for e in engines
    )
    kept, _, reason = choose(candidates, *_asked(bundle.manifest.recipe, len(golden)))
    return kept, candidates, reason


def _asked(recipe: Mapping[str, Any], count: int) -> tuple[str, float]:
    """The precision that the manifest's `recipe` asks for, and the least percentage of `count` images that must agree.

    Few images say little of a share: the least number whose 95 % interval reaches ``min_agreement`` is enough.
    """
    asked = Recipe(**{k: recipe[k] for k in ("precision", "min_agreement") if k in recipe})  # checked there
    enough = (k for k in range(count) if 100 * proportion_interval(k, count)[1] >= asked.min_agreement)
    return asked.precision, 100 * (next(enough, count) / count)


def _account(name: str, kept: Candidate, candidates: tuple[Candidate, ...], reason: str) -> dict[str, Any]:
    rows = [
        {
            "precision": c.artifact.precision,
            "size_bytes": c.artifact.size_bytes,
            "latency_ms": latency_ms(c.samples_ns),
            "samples_ns": list(c.samples_ns),
            "agreement": 100 * c.parity.agreement,
            "settings": dict(c.artifact.settings),
            "kept": c is kept,
        }
        for c in candidates
    ]
    return {
        "target": name,
        "precision": kept.artifact.precision,
        "latency_ms": latency_ms(kept.samples_ns),
        "reason": reason,
        "candidates": rows,
        "device": fingerprint(),
    }


def _seal(bundle: Bundle, folder: Path, name: str, entry: TargetEntry, golden: Array) -> None:
    """The golden outputs of the engine and their tolerance beside the others', and a manifest over everything."""
    made: dict[str, Any] = {f"outputs.{name}": golden, f"tolerance.{name}": tolerance(golden, entry.precision)}
    arrays: dict[str, Any] = {**bundle.golden, **made}
    np.savez(folder / "golden.npz", **arrays)
    content = bundle.manifest.model_dump(exclude={"schema_version", "files"})
    content["targets"][name] = entry.model_dump()
    seal(folder, content)
