"""A gate's outcome for machines and people: JSON, JUnit XML, Markdown, GitHub annotations. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from compressor.gate import GateVerdict
from compressor.gate.rules import Finding
from compressor.types import Verdict

__all__ = ["GateResult", "github", "junit", "markdown", "to_json"]

SYMBOLS = {"pass": "✅", "fail": "❌", "inconclusive": "❔"}
LEVELS = {"pass": "notice", "fail": "error", "inconclusive": "warning"}


@dataclass(frozen=True)
class GateResult:
    """Everything a gate found.

    Attributes:
        latency: the verdict on latency.
        device: fingerprint of the machine that measured.
        findings: rules that are broken or could not be checked.
        p50_ms: median latency, ``candidate`` and ``baseline``.
        ratios: candidate / baseline of every pair, one list per run.
        seconds: how long it took.
        setting: ``target``, ``threads`` and ``batch`` of both sides; the ``seed`` of the coins where there were any.
    """

    latency: GateVerdict
    device: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    p50_ms: Mapping[str, float] = field(default_factory=dict)
    ratios: Sequence[Sequence[float]] = ()
    seconds: float = 0.0
    setting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overall(self) -> Verdict:
        """Fail if anything fails, else inconclusive if anything is, else pass; the sentences of all."""
        verdicts = [self.latency.verdict, *(f.verdict for f in self.findings)]
        worst = min(verdicts, key=("fail", "inconclusive", "pass").index)
        return Verdict(worst, " ".join([self.latency.sentence, *(f.sentence for f in self.findings)]))


def to_json(result: GateResult) -> dict[str, Any]:
    """The ``vitrim gate --json`` object. Ratios are candidate time / baseline time; a bound that is not known is null."""
    latency = result.latency
    return {
        "verdict": result.overall.verdict,
        "sentence": result.overall.sentence,
        "ratio": latency.ratio,
        "ratio_ci": [_known(latency.ratio_ci[0]), _known(latency.ratio_ci[1])],
        "limit": latency.limit,
        "min_detectable": _known(latency.min_detectable),
        "pairs": latency.pairs,
        "confirmed": latency.confirmed,
        "device": dict(result.device),
        "latency": latency.verdict,
        "latency_ms": dict(result.p50_ms),
        "findings": [vars(finding) for finding in result.findings],
        "runs": [list(run) for run in result.ratios],
        "seconds": result.seconds,
        **result.setting,
    }


def junit(result: GateResult, name: str) -> str:
    """JUnit XML: one test case for latency and one per finding; inconclusive counts as an error, not as a failure.

    Args:
        result: what the gate found.
        name: of the suite, e.g. the candidate bundle.
    """
    cases = [("latency", result.latency.verdict, result.latency.sentence)]
    cases += [(finding.rule, finding.verdict, finding.sentence) for finding in result.findings]
    counts = {kind: str(sum(verdict == kind for _, verdict, _ in cases)) for kind in ("fail", "inconclusive")}
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": f"vitrim gate {_printable(name)}",
            "tests": str(len(cases)),
            "failures": counts["fail"],
            "errors": counts["inconclusive"],
        }
        | {"time": f"{result.seconds:.3f}"},
    )
    for rule, verdict, sentence in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "vitrim.gate", "name": rule})
        if verdict != "pass":
            tag = {"fail": "failure", "inconclusive": "error"}[verdict]
            ElementTree.SubElement(case, tag, {"message": _printable(sentence)})
        else:
            ElementTree.SubElement(case, "system-out").text = _printable(sentence)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def markdown(result: GateResult, candidate: str, baseline: str) -> str:
    """A comment for a pull request."""
    overall, latency, ms = result.overall, result.latency, result.p50_ms
    low, high = (f"{v:.3f}" if math.isfinite(v) and v > 0 else "unknown" for v in latency.ratio_ci)
    title = {"pass": "within the limits", "fail": "regression", "inconclusive": "inconclusive"}[overall.verdict]
    lines = [f"### {SYMBOLS[overall.verdict]} vitrim gate: {title}", "", f"{_cell(latency.sentence)}", ""]
    lines += ["| | candidate | baseline |", "|---|---|---|", f"| bundle | {_cell(candidate)} | {_cell(baseline)} |"]
    if ms:
        lines.append(f"| latency p50 | {ms['candidate']:.3f} ms | {ms['baseline']:.3f} ms |")
    lines += [
        "",
        f"Ratio {latency.ratio:.3f} ({low} to {high}), limit {latency.limit:.3f}; "
        f"{latency.pairs} process pairs in {result.seconds:.0f} s.",
    ]
    if math.isfinite(latency.min_detectable) and latency.verdict != "inconclusive":  # whose sentence says it where true
        lines.append(f"On this machine a slow-down of {100 * (latency.min_detectable - 1):.1f} % or more is found.")
    lines += (
        ["", *(f"- {SYMBOLS[f.verdict]} **{f.rule}**: {_cell(f.sentence)}" for f in result.findings)]
        if result.findings
        else []
    )
    cpu = result.device.get("cpu", {}).get("model", "unknown CPU")
    return "\n".join(
        [*lines, "", f"<sub>{_cell(str(cpu))}, device {_cell(str(result.device.get('id', '?')))}</sub>", ""]
    )


def github(result: GateResult) -> list[str]:
    """GitHub workflow commands, one per verdict; print them where ``GITHUB_ACTIONS`` is set."""
    rows = [("latency", result.latency.verdict, result.latency.sentence)]
    rows += [(f.rule, f.verdict, f.sentence) for f in result.findings]
    return [f"::{LEVELS[verdict]} title=vitrim gate ({rule})::{_command(sentence)}" for rule, verdict, sentence in rows]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) and value > 0 else None


def _printable(text: str) -> str:
    """Text without the control characters that XML forbids."""
    return "".join(c if c >= " " or c in "\t\n" else "?" for c in text)


def _cell(text: str) -> str:
    """Text that cannot leave its Markdown table cell or smuggle in markup."""
    escaped = "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in text)
    return escaped.replace("\n", " ").replace("\r", " ")


def _command(text: str) -> str:
    """Text of a workflow command, escaped as the runner unescapes it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
