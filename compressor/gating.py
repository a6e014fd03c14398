"""`vitrim gate`: a candidate bundle against a baseline bundle, side by side, or against a stored profile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor.bundle import Bundle
from compressor.compiled import is_simulated
from compressor.device import fingerprint
from compressor.duel import Contender, DuelConfig, duel, profile_fresh, silent
from compressor.errors import BundleError, ConfigError, DataError
from compressor.gate import GateConfig, conclude_stored, output
from compressor.gate.output import GateResult
from compressor.gate.rules import Facts, Finding, RuleConfig, check, facts_of
from compressor.history import append, read, trend
from compressor.output import write_text
from compressor.profile import ProfileConfig
from compressor.profile_json import from_json
from compressor.types import Profile, Progress

__all__ = ["GateOptions", "check_outputs", "gate_bundles", "gate_stored", "publish", "run_gate"]


@dataclass(frozen=True)
class GateOptions:
    """What to compare and what to forbid.

    Attributes:
        target: of both bundles; by default the first of the candidate's that runs here.
        threads: of both sessions.
        batch: images per inference.
        gate: limit and confidence of the latency test.
        rules: what else is forbidden.
        duel: how pairs are timed.
        cross_device: whether a stored profile of another machine may be compared with.
    """

    target: str | None = None
    threads: int = 1
    batch: int = 1
    gate: GateConfig = field(default_factory=GateConfig)
    rules: RuleConfig = field(default_factory=RuleConfig)
    duel: DuelConfig = field(default_factory=DuelConfig)
    cross_device: bool = False


def run_gate(
    candidate: Path, baseline: Path | None, stored: Path | None, options: GateOptions, progress: Progress = silent
) -> GateResult:
    """`gate_bundles` or `gate_stored`, whichever of `baseline` and `stored` is given.

    Raises:
        ConfigError: both or neither are.
    """
    if baseline is not None and stored is None:
        return gate_bundles(candidate, baseline, options, progress)
    if stored is not None and baseline is None:
        return gate_stored(candidate, stored, options)
    got = "neither" if baseline is None else "both"
    raise ConfigError(f"gate: exactly one of --baseline and --stored must be given, got {got}.")


def check_outputs(junit: Path | None, markdown: Path | None, history: Path | None) -> None:
    """Refuse, before minutes of measuring, what `publish` could not write.

    Raises:
        ConfigError: a file would lie in no folder, or the history is no folder.
        DataError: the history is damaged.
    """
    for option, path in (("--junit", junit), ("--markdown", markdown)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(
                f"gate: {option} must be a file in a folder that exists, got {str(path)!r}.", hint="Create the folder."
            )
    if history is not None:
        nearest = next(p for p in (history.absolute(), *history.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise ConfigError(f"gate: --history must be a folder, got {str(history)!r}.", hint=f"{nearest} is a file.")
        read(history)


def publish(
    result: GateResult,
    candidate: Path,
    baseline: Path | None,
    *,
    junit: Path | None,
    markdown: Path | None,
    history: Path | None,
) -> dict[str, Any]:
    """Write the files that were asked for, annotate where GitHub runs us, and return the ``vitrim gate --json`` object."""
    data = {"candidate": str(candidate), "baseline": str(baseline), **output.to_json(result)}
    if history is not None:
        append(history, data)
        data["history"] = trend(history, data)
    if junit is not None:
        write_text(junit, output.junit(result, str(candidate)))
    if markdown is not None:
        write_text(markdown, output.markdown(result, str(candidate), str(baseline)))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(output.github(result)), file=sys.stderr)
    return data


def gate_bundles(
    candidate: str | Path, baseline: str | Path, options: GateOptions, progress: Progress = silent
) -> GateResult:
    """What changed from `baseline` to `candidate`, both run here and now in alternating fresh processes.

    Raises:
        BundleError: a bundle is damaged, or lacks the report that a rule needs.
        DataError: that report is damaged.
        ConfigError: a bundle does not hold the target, or only its simulator is here.
        TargetUnavailable: the target cannot run here.
    """
    bundles = {"candidate": Bundle.open(candidate), "baseline": Bundle.open(baseline)}
    target = options.target or bundles["candidate"].default_target
    if is_simulated(target):
        raise ConfigError(
            f"gate: target must run on this machine, got {target!r}, of which only a simulator is here.",
            hint="A simulator's speed says nothing about the chip; compare the estimates of `vitrim profile`.",
        )
    sides = {name: _contender(bundle, target, options) for name, bundle in bundles.items()}
    findings: tuple[Finding, ...] = ()
    if options.rules != RuleConfig():  # before the minutes of the duel: what they need may be missing
        facts = {name: _facts(bundle, target, sides[name], options) for name, bundle in bundles.items()}
        findings = check(facts["baseline"], facts["candidate"], options.rules)
    timing = replace(options.duel, threads=options.threads)
    fought = duel(sides["candidate"], sides["baseline"], options.gate, timing, progress)
    ratios = [[pair.ratio for pair in run] for run in fought.runs]
    setting = {**_setting(target, options), "seed": options.gate.seed}
    return GateResult(fought.verdict, fingerprint(), findings, fought.p50_ms(), ratios, fought.seconds, setting)


def gate_stored(candidate: str | Path, stored: str | Path, options: GateOptions) -> GateResult:
    """The weaker comparison with a stored ``vitrim profile --json`` object: nothing alternates, so drift is doubt.

    Raises:
        DataError: `stored` is not such an object.
        ConfigError: it was measured on another machine, with other threads, batch or target; or there are rules about
            more than latency, which is all a profile knows.
    """
    if options.rules != RuleConfig():
        raise ConfigError(
            "gate: rules about accuracy, size, memory, int8 or fallbacks must be given with --baseline, got --stored.",
            hint="Compare with the baseline's bundle.",
        )
    before = _stored(Path(stored))
    bundle = Bundle.open(candidate)
    target = options.target or before.target or bundle.default_target
    contender, setting, device = _contender(bundle, target, options), _setting(target, options), fingerprint()["id"]
    for name, value in setting.items():
        if getattr(before, name) != value:
            raise ConfigError(
                f"gate: {name} must be that of the stored profile, {getattr(before, name)!r}, got {value!r}.",
                hint=f"Give --{name} {getattr(before, name)}.",
            )
    if before.device.get("id") != device and not options.cross_device:
        raise ConfigError(
            f"gate: the stored profile must be of this device, {device}, got {before.device.get('id', 'unknown')!r}.",
            hint="Measure the baseline bundle here, or allow it with --cross-device.",
        )
    now = profile_fresh(contender, ProfileConfig(threads=options.threads, target=target))
    verdict = conclude_stored(before, now, options.gate)
    medians = {"candidate": now.latency_ms()["p50"], "baseline": before.latency_ms()["p50"]}
    return GateResult(verdict, now.device, (), medians, setting=setting)


def _contender(bundle: Bundle, target: str, options: GateOptions) -> Contender:
    bundle.artifact(target)  # A wrong target is named here, not by a worker
    return Contender(
        {"path": str(bundle.root.resolve()), "target": target, "threads": options.threads, "batch": options.batch}
    )


def _setting(target: str, options: GateOptions) -> dict[str, Any]:
    return {"target": target, "threads": options.threads, "batch": options.batch}


def _facts(bundle: Bundle, target: str, contender: Contender, options: GateOptions) -> Facts:
    path = bundle.root / "report.json"
    if "report.json" not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.root}: a bundle must hold report.json for these rules.", hint="Gate on latency only."
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: must be JSON, got {error}.", hint="Make the bundle again.") from None
    facts = facts_of(report, target, bundle.artifact(target).size_bytes)
    if options.rules.max_memory_growth is None:
        return facts
    quick = ProfileConfig(runs=10, threads=options.threads)
    return replace(facts, peak_rss_bytes=profile_fresh(contender, quick).peak_rss_bytes)


def _stored(path: Path) -> Profile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: a stored profile must be a readable JSON file, got {error}.") from None
    if not isinstance(data, Mapping):
        raise DataError(f"{path}: a stored profile must be a JSON object, got {type(data).__name__}.")
    return from_json(dict[str, Any](data))
