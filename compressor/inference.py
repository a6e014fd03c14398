"""What the commands that run something have in common: a session of a bundle's target, or of a plain model in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import targets
from calibration import data
from compressor import history, peaks
from compressor.bundle import Bundle, is_bundle
from compressor.compiled import estimated_profile, is_simulated
from compressor.duel import Contender, profile_fresh
from compressor.errors import BundleError, ConfigError, DataError
from compressor.output import write_text
from compressor.profile import ProfileConfig, profile, throughput
from compressor.profile_json import to_json
from compressor.result import Result
from compressor.signature import Signature, check_signature
from compressor.types import Array, Artifact, Preprocess, Progress, Session, VitSpec
from compressor.verify import accuracy

__all__ = [
    "Source",
    "evaluate_source",
    "open_to_verify",
    "profile_source",
    "verified",
    "verify_bundle",
    "write_history",
    "write_report",
]


@dataclass(frozen=True)
class Source:
    """What a command was asked to run: a bundle or a model, where, and with how many threads."""

    path: str
    target: str | None = None
    threads: int = 1
    arch: str | None = None


@dataclass(frozen=True)
class Opened:
    """Something that can run: how to open its session, its artifact, and the images it takes."""

    target: str
    opener: Callable[[], Session]
    artifact: Artifact
    preprocess: Preprocess
    labels: tuple[str, ...]
    num_classes: int
    golden: Array | None  # (8, C, h, w) of a bundle
    spec: VitSpec
    calibrated_on: frozenset[str] = frozenset()  # content hashes of images


def open_source(source: Source, stack: ExitStack) -> Opened:
    """The bundle on its target, or the model in float on its target (default ort)."""
    if is_bundle(source.path):
        bundle = stack.enter_context(Bundle.open(source.path))
        if source.arch is not None:
            raise ConfigError(f"arch must not be given with a bundle, which knows its own, got {source.arch!r}.")
        name = source.target or bundle.default_target
        artifact = bundle.artifact(name)
        opener: Callable[[], Session] = partial(targets.get(name).open, artifact, threads=source.threads)
        return Opened(
            name,
            opener,
            artifact,
            bundle.preprocess,
            tuple(bundle.manifest.labels),
            bundle.spec.num_classes,
            bundle.golden["inputs"],
            bundle.spec,
            bundle.calibrated_on,
        )
    from compressor.candidates import open_model
    from compressor.loading import load_model, require_exportable

    model = load_model(source.path, arch=source.arch)
    require_exportable(model.spec)
    name = source.target or "ort"
    opener, artifact = open_model(model, name, source.threads, stack)
    return Opened(name, opener, artifact, model.preprocess, model.labels, model.spec.num_classes, None, model.spec)


def profile_source(source: Source, *, batch: int, per_op: bool, streams: int = 0) -> dict[str, Any]:
    """The ``vitrim profile --json`` object of a bundle or model; with `streams`, throughput of that many at once too.

    A bundle is profiled in a process of its own, so that load time and peak memory are its session's alone. Where only a
    simulator runs it here, nothing is timed: the answer is what its compiler estimated.
    """
    with ExitStack() as stack:
        opened = open_source(source, stack)
        feed = opened.artifact.inputs[0]
        if feed.shape[0] not in (-1, batch):
            raise ConfigError(
                f"batch must be {feed.shape[0]} for target {opened.target!r}, whose artifact is static, got {batch}."
            )
        if opened.golden is not None and is_simulated(opened.target):
            if streams:
                raise ConfigError(f"streams must be 0 for target {opened.target!r}, simulated here, got {streams}.")
            return estimated_profile(opened.artifact, threads=source.threads, per_op=per_op)
        inputs = {feed.name: np.resize(_pixels(opened), (batch, *feed.shape[1:]))}
        versions = {opened.target: targets.get(opened.target).available().version}
        config = ProfileConfig(threads=source.threads, target=opened.target, versions=versions)
        if opened.golden is None:
            found = profile(opened.opener, inputs, config)
        else:
            where = {"path": source.path, "target": opened.target, "threads": source.threads, "batch": batch}
            found = profile_fresh(Contender(where), config)
        ops = opened.opener().ops(inputs) if per_op else ()
        parts = peaks.parts(ops, opened.spec, opened.artifact, threads=source.threads, batch=batch) if ops else []
        result = {"precision": opened.artifact.precision, **to_json(replace(found, ops=ops)), "parts": parts}
        if streams > 0:
            rate = throughput(opened.opener, inputs, streams=streams)
            result["throughput"] = {"streams": streams, "images_per_s": rate}
    return result


def _pixels(opened: Opened) -> Array:
    """Golden inputs of a bundle; random ones for a model, which is fine for latency and for nothing else."""
    if opened.golden is not None:
        return opened.golden
    return np.random.default_rng(0).standard_normal((1, *opened.artifact.inputs[0].shape[1:]), np.float32)


def evaluate_source(source: Source, images: str, reference: str | None, progress: Progress) -> dict[str, Any]:
    """The ``vitrim eval --json`` object: accuracy of `source` on `images`, agreement with `reference`.

    The reference of a bundle is its own float model, on the same target or, where that has no float, on ONNX Runtime; of a
    model nothing, unless `reference` names one.
    """
    with ExitStack() as stack:
        opened = open_source(source, stack)
        dataset = data.open_images(images)
        labels = data.match_labels(dataset, opened.labels, opened.num_classes) if dataset.labels is not None else None
        rival = _reference(source, reference, opened, stack)
        got, expected = [], []
        session, other = opened.opener(), rival[0]() if rival else None
        from compressor.candidates import logits

        for pixels in data.batches(
            dataset, opened.preprocess, 50, lambda done, total: progress("evaluate", done, total)
        ):
            got.append(logits(session, opened.artifact, pixels))
            if rival and other is not None:
                expected.append(logits(other, rival[1], pixels))
    seen = sum(image in opened.calibrated_on for image in dataset.content_hashes()) if opened.calibrated_on else 0
    found = accuracy(np.concatenate(got), labels, np.concatenate(expected) if expected else None)
    return {
        "source": source.path,
        "target": opened.target,
        "precision": opened.artifact.precision,
        "data": images,
        "reference": (reference or source.path) if rival else None,
        "calibrated_on_them": seen > 0,
        "calibration_images": seen,
        **found,
    }


def _reference(
    source: Source, reference: str | None, opened: Opened, stack: ExitStack
) -> tuple[Callable[[], Session], Artifact] | None:
    name = reference or (source.path if is_bundle(source.path) else None)
    if name is None:
        return None
    from compressor.candidates import open_model
    from compressor.loading import load_model

    model = load_model(name)
    if model.preprocess.size != opened.preprocess.size or model.spec.num_classes != opened.num_classes:
        raise ConfigError(f"reference {name!r} must take the same images and give the same classes as {source.path!r}.")
    has_float = "fp32" in targets.get(opened.target).CAPABILITIES.precisions
    return open_model(model, opened.target if has_float else "ort", source.threads, stack)


def verify_bundle(path: Path, target: str | None, signers: Path | None = None) -> Result:
    """Hashes (checked on opening), signature, then each target's golden outputs; exit code 1 when any check fails."""
    bundle = open_to_verify(path)
    signature = check_signature(bundle.root / "manifest.json", signers)
    checks = [_check(bundle, name) for name in ([target] if target else bundle.manifest.targets)]
    return verified(path, len(bundle.manifest.files), checks, signature)


def open_to_verify(path: Path) -> Bundle:
    """The bundle at `path`; one that fails its own hashes has failed verification (exit code 1), no bundle is bad input."""
    if not path.exists():
        raise BundleError(f"{path}: a bundle must be a folder or a .zip file, found neither.", hint="Check the path.")
    try:
        return Bundle.open(path)
    except BundleError as error:
        error.exit_code = 1 if is_bundle(str(path)) else 2
        raise


def verified(path: Path, files: int, checks: Sequence[Mapping[str, Any]], signature: Signature | None = None) -> Result:
    """What ``vitrim verify`` answers: passed when a target ran and nothing failed; exit code 3 when none could run here."""
    lines = [f"{path}: {files} files match their hashes"]
    if signature is not None:
        lines.append(f"  signature: {'valid' if signature.valid else 'FAIL'}: {signature.reason}")
    for check in checks:
        if check["passed"] is None:
            lines.append(f"  {check['target']}: not run: {check['skipped']}")
            continue
        verdict = "pass" if check["passed"] else "FAIL"
        worst = "not finite" if check["max_abs"] is None else f"{check['max_abs']:.3g}"
        lines.append(f"  {check['target']}: {verdict}, largest difference {worst} (limit {check['tolerance']:.3g})")
    forged = signature is not None and not signature.valid
    failed = forged or any(c["passed"] is False for c in checks)
    ran = any(c["passed"] is not None for c in checks)
    signed = None if signature is None else asdict(signature)
    found = {"bundle": str(path), "passed": ran and not failed, "files": files, "signature": signed}
    return Result({**found, "targets": [dict(c) for c in checks]}, lines, 1 if failed else 0 if ran else 3)


def _check(bundle: Bundle, name: str) -> dict[str, Any]:
    if bundle.artifact(name).settings.get("stage") == "plan":
        return {"target": name, "passed": None, "skipped": "a build plan; complete it with vitrim build, on the device"}
    if name not in targets.names():
        return {"target": name, "passed": None, "skipped": "no target of this name is installed here"}
    state = targets.get(name).available()
    if not (state.available and state.runs):
        return {"target": name, "passed": None, "skipped": state.reason}
    return bundle.check(name)


def write_report(path: Path, out: Path | None) -> Path:
    """Render the bundle's report.json as one HTML page at `out`, by default ``<bundle>.html`` beside it."""
    import json

    from compressor.report import render

    bundle = Bundle.open(path)
    source = bundle.root / "report.json"
    if "report.json" not in bundle.manifest.files:
        raise BundleError(f"{path}: a bundle must hold report.json to report on.", hint="Make the bundle again.")
    whole = path.absolute()
    name = whole.stem if whole.is_file() else whole.name  # b.zip, but not the folder b.v1
    return write_text(out or whole.with_name(f"{name}.html"), render(json.loads(source.read_text(encoding="utf-8"))))


def write_history(folder: Path, out: Path | None) -> Path:
    """Render the history that ``vitrim gate --history`` keeps in `folder` as one HTML page at `out`, by default in it.

    Raises:
        DataError: there is none, no run of it has a latency, or a line is damaged.
    """
    from compressor.report.trend import Series, render_history

    found = history.series(history.read(folder))
    if not found:
        raise DataError(
            f"{folder}: a history must hold at least one run with a latency, found none.",
            hint=f"Keep one: vitrim gate NEW --baseline OLD --history {folder}",
        )
    charts = []
    for (device, *setting), entries in found.items():
        title = ", ".join(
            f"{name} {value}" for name, value in zip(("target", "threads", "batch"), setting, strict=True)
        )
        cpu = entries[-1]["device"].get("cpu")
        model = cpu.get("model", "unknown CPU") if isinstance(cpu, Mapping) else "unknown CPU"
        charts.append(Series(title, f"{model}, device {device}", entries, **history.levels(entries)))
    return write_text(out or folder / "history.html", render_history(folder.absolute().name, charts))
