"""A gate's history as one self-contained HTML page: the candidate's latency run by run, with its change points marked.

Pure: series in, text out. Entries come from files that are not to be trusted; the template and the charts escape them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from compressor.report.charts import Curve, Point, timeline
from compressor.report.page import page

__all__ = ["Series", "render_history"]

Json = Mapping[str, Any]
CANDIDATE, FAILED, BASELINE = 0, 4, 5  # colours
COLOR = {"pass": CANDIDATE, "inconclusive": FAILED, "fail": FAILED}


@dataclass(frozen=True)
class Series:
    """Runs that may be laid on one line, oldest first.

    Attributes:
        title: what they have in common: target, threads, batch.
        device: the machine, in words.
        entries: ``vitrim gate --json`` objects.
        p50_ms: the candidate's median in each.
        change_points: indices at which a new level begins.
    """

    title: str
    device: str
    entries: Sequence[Json]
    p50_ms: Sequence[float]
    change_points: Sequence[int]


def render_history(name: str, series: Sequence[Series]) -> str:
    """The HTML page of a history called `name`, one chart per series."""
    from markupsafe import Markup

    shown = []
    for s in series:
        chart = Markup(_chart(s))  # compressor.report.charts escapes
        note = f"{s.device}; runs: {len(s.entries)}; changes of level: {len(s.change_points) or 'none found'}."
        shown.append({"title": s.title, "note": note, "chart": chart, "changes": _changes(s), "runs": _runs(s)})
    return page("history", name=name, series=shown)


def _levels(s: Series) -> list[tuple[int, int, float]]:
    """First index, last index + 1, and median of every level."""
    bounds = [0, *s.change_points, len(s.p50_ms)]
    return [(a, b, median(s.p50_ms[a:b])) for a, b in pairwise(bounds)]


def _chart(s: Series) -> str:
    points = []
    for run, (entry, ms) in enumerate(zip(s.entries, s.p50_ms, strict=True), 1):
        verdict = str(entry.get("verdict"))
        filled = verdict != "inconclusive"
        points.append(Point(run, ms, f"{_name(entry)}, {verdict}", COLOR.get(verdict, CANDIDATE), filled=filled))
    lines = [Curve([a + 1, b], [ms, ms], f"level {ms:.3g} ms", CANDIDATE) for a, b, ms in _levels(s)]
    known = [(run, old) for run, entry in enumerate(s.entries, 1) if (old := _baseline(entry)) is not None]
    if known:
        runs, values = zip(*known, strict=True)
        lines.append(Curve(runs, values, "baseline", BASELINE, dashed=True))
    changes = [(at + 0.5, _change(*pair)) for at, pair in zip(s.change_points, _pairs(s), strict=True)]
    return timeline(points, lines, changes, "latency p50, ms")


def _pairs(s: Series) -> list[tuple[float, float]]:
    """The levels before and after each change point."""
    medians = [ms for _, _, ms in _levels(s)]
    return list(pairwise(medians))


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def _changes(s: Series) -> list[dict[str, Any]]:
    return [
        {
            "run": at + 1,
            "before": _ms(before),
            "after": _ms(after),
            "change": _change(before, after),
            "candidate": _name(s.entries[at]),
        }
        for at, (before, after) in zip(s.change_points, _pairs(s), strict=True)
    ]


def _runs(s: Series) -> list[dict[str, Any]]:
    rows = []
    for run, (entry, ms) in enumerate(zip(s.entries, s.p50_ms, strict=True), 1):
        row = {"run": run, "verdict": str(entry.get("verdict")), "candidate": _name(entry)}
        before = _baseline(entry)
        rows.append({**row, "candidate_ms": _ms(ms), "baseline_ms": "" if before is None else _ms(before)})
    return rows[::-1]


def _ms(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") + " ms"


def _name(entry: Json) -> str:
    return str(entry.get("candidate", ""))


def _baseline(entry: Json) -> float | None:
    value = entry["latency_ms"].get("baseline")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None
