"""What a gate may forbid besides latency. A rule is a function that returns a finding, or None when it has nothing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compressor.errors import ConfigError, DataError
from compressor.roofline import SILENT
from compressor.types import OpRecord

__all__ = ["Facts", "Finding", "Images", "RuleConfig", "check", "facts_of"]


@dataclass(frozen=True)
class Images:
    """What an accuracy is of: "evaluation" or "calibration" images, how many, and their digest where it is known."""

    kind: str
    count: int
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.count} {self.kind} images"

    def may_be(self, other: Images) -> bool:
        """Whether nothing tells these images from `other`."""
        known = None not in (self.sha256, other.sha256)
        same = (self.kind, self.count) == (other.kind, other.count)
        return same and (self.sha256 == other.sha256 or not known)


@dataclass(frozen=True)
class Facts:
    """What rules compare, of one bundle on one target; None where it is not known.

    Attributes:
        top1: percent, on the bundle's evaluation images.
        top1_ci: its 95 % interval.
        agreement: percent of images with the original model's class.
        images: that these accuracies are of.
        ops: nodes as executed.
    """

    size_bytes: int
    top1: float | None = None
    top1_ci: tuple[float, float] | None = None
    agreement: float | None = None
    images: Images | None = None
    peak_rss_bytes: int | None = None
    ops: tuple[OpRecord, ...] = ()


@dataclass(frozen=True)
class RuleConfig:
    """Which rules hold; None and False switch a rule off.

    Attributes:
        max_drop: largest loss of top-1 (of agreement where images have no labels), in points.
        max_size_growth: largest growth of the artifact, 0.1 = 10 %.
        max_memory_growth: largest growth of the peak resident memory.
        min_int8_share: smallest share of node time spent in integer nodes, 0.5 = half.
        forbid_fallback: no node may run on the CPU while others run on an accelerator.
    """

    max_drop: float | None = None
    max_size_growth: float | None = None
    max_memory_growth: float | None = None
    min_int8_share: float | None = None
    forbid_fallback: bool = False

    def __post_init__(self) -> None:
        for name in ("max_drop", "max_size_growth", "max_memory_growth"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be zero or more, got {value}.")
        if self.min_int8_share is not None and not 0 <= self.min_int8_share <= 1:
            raise ConfigError(f"min_int8_share must be in [0, 1], got {self.min_int8_share}.")


@dataclass(frozen=True)
class Finding:
    """A rule that is broken ("fail"), or that could not be checked ("inconclusive"), in one sentence."""

    rule: str
    verdict: Literal["fail", "inconclusive"]
    sentence: str


def facts_of(report: Mapping[str, Any], target: str, size_bytes: int) -> Facts:
    """The facts in a bundle's report.json about `target`; of one that was not run when the bundle was made, only its size.

    Args:
        report: the parsed report.json.
        target: of the bundle.
        size_bytes: of its artifact.

    Raises:
        DataError: the report is not one.
    """
    try:
        entry = next((t for t in report["targets"] if t["name"] == target), None)
        if entry is None:  # completed later, by `vitrim build`
            return Facts(size_bytes)
        accuracy, total = entry.get("accuracy") or report["compressed"], report["compressed"]
        interval, kind = accuracy.get("top1_ci95"), str(total["evaluated_on"])
        digest = report.get("provenance", {}).get(kind, {}).get("sha256")
        ops = entry.get("ops") or report.get("ops", {}).get(target, [])
        return Facts(
            size_bytes,
            top1=accuracy.get("top1"),
            top1_ci=None if interval is None else (float(interval[0]), float(interval[1])),
            agreement=accuracy.get("agreement"),
            images=Images(kind, int(accuracy["n"]), digest),
            ops=tuple(OpRecord(**{k: v for k, v in op.items() if k in OpRecord.__annotations__}) for op in ops),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"report.json must be what `vitrim compress` writes, got {error!r}.") from error


def check(baseline: Facts, candidate: Facts, config: RuleConfig) -> tuple[Finding, ...]:
    """Findings of every rule that is switched on, none when all hold."""
    found = (
        accuracy_drop(baseline, candidate, config.max_drop),
        growth("size", "artifact", baseline.size_bytes, candidate.size_bytes, config.max_size_growth),
        growth("memory", "peak memory", baseline.peak_rss_bytes, candidate.peak_rss_bytes, config.max_memory_growth),
        int8_share(candidate.ops, config.min_int8_share),
        fallback(candidate.ops) if config.forbid_fallback else None,
    )
    return tuple(finding for finding in found if finding is not None)


def accuracy_drop(baseline: Facts, candidate: Facts, limit: float | None) -> Finding | None:
    """Loss of top-1, or of agreement where there is no top-1, against `limit` points."""
    if limit is None:
        return None
    name = "top1" if baseline.top1 is not None and candidate.top1 is not None else "agreement"
    before, after = getattr(baseline, name), getattr(candidate, name)
    old, new = baseline.images, candidate.images
    if before is None or after is None or old is None or new is None:
        why = "a bundle holds neither top-1 nor agreement of this target; engines that `vitrim build` made have none"
        return Finding("accuracy", "inconclusive", f"Accuracy cannot be compared: {why}.")
    if not new.may_be(old):
        why = f"the baseline's is of {old}, the candidate's of {'others' if str(new) == str(old) else new}"
        return Finding("accuracy", "inconclusive", f"Accuracy cannot be compared: {why}.")
    if before - after <= limit:
        return None
    interval = ""
    if name == "top1" and candidate.top1_ci is not None:
        interval = f" (95 % interval {candidate.top1_ci[0]:.2f} to {candidate.top1_ci[1]:.2f})"
    label = {"top1": "Top-1", "agreement": "Agreement with the original"}[name]
    return Finding(
        "accuracy",
        "fail",
        f"{label} fell by {before - after:.2f} points, from {before:.2f} to {after:.2f}{interval}; {limit:g} are allowed.",
    )


def growth(rule: str, what: str, before: int | None, after: int | None, limit: float | None) -> Finding | None:
    """Relative growth of `what` in bytes against `limit`."""
    if limit is None:
        return None
    if before is None or after is None:
        return Finding(rule, "inconclusive", f"The {what} cannot be compared: it was not measured.")
    share = after / before - 1 if before > 0 else float("inf")
    if share <= limit:
        return None
    return Finding(
        rule,
        "fail",
        f"The {what} grew by {100 * share:.1f} %, from {before} to {after} bytes; {100 * limit:g} % are allowed.",
    )


def int8_share(ops: Sequence[OpRecord], minimum: float | None) -> Finding | None:
    """Share of node time in int8 against `minimum`."""
    if minimum is None:
        return None
    total = sum(op.time_ms for op in ops)
    if total <= 0:
        return Finding("int8", "inconclusive", "The int8 share cannot be told: the bundle holds no per-node times.")
    share = sum(op.time_ms for op in ops if op.precision in ("int8", "i8", "u8")) / total
    if share >= minimum:
        return None
    return Finding(
        "int8",
        "fail",
        f"Only {100 * share:.1f} % of the node time is spent in int8; {100 * minimum:g} % are asked for.",
    )


def fallback(ops: Sequence[OpRecord]) -> Finding | None:
    """Nodes on the CPU although the target has another place to run them."""
    alive = [op for op in ops if op.type not in SILENT]
    if not alive:
        return Finding("fallback", "inconclusive", "Fallbacks cannot be told: the bundle holds no per-node table.")
    elsewhere = sorted({op.placement for op in alive} - {"CPU", ""})
    fallen = [op for op in alive if op.placement == "CPU"]
    if not elsewhere or not fallen:
        return None
    some = ", ".join(f"{op.name} ({op.type})" for op in fallen[:3]) + (", ..." if len(fallen) > 3 else "")
    return Finding(
        "fallback", "fail", f"{len(fallen)} of {len(alive)} nodes fell back from {elsewhere[0]} to the CPU: {some}."
    )
