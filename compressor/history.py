"""Results over time: one JSON object per line, and the points where the level changed.

**Change points.** The series is taken as steps plus noise. The steps minimise sum |x_i - step| + penalty * (number of
steps), solved exactly by dynamic programming; absolute errors, so that single outliers do not make a step. The penalty
is the noise (median absolute difference of neighbours, which steps hardly touch) times 2 log n, as in the Schwarz
criterion; a heuristic that a person looks at and that never fails a gate.

Source: F. Friedrich, A. Kempe, V. Liebscher, G. Winkler 2008, J. Comput. Graph. Stat. 17(1), 201-224 (penalised step
fits).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import DataError

__all__ = ["append", "change_points", "levels", "read", "series", "trend"]

Setting = tuple[str, ...]  # device id, target, threads, batch
FILE = "history.jsonl"
SHORTEST = 3  # values in a level: one bad day is not a new level
LONGEST = 300  # most recent values looked at: about a second


def append(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Add `entry` as one line to the history in `folder`, made if needed; the file written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with path.open("ab", buffering=0) as f:  # One write of one line: appends of parallel jobs do not mix
        f.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """Every entry, oldest first; none when there is no history yet.

    Raises:
        DataError: a line is not a JSON object, or not UTF-8.
    """
    path = folder / FILE
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            entry = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"{path}: line {number} must be a JSON object, got {error}.", hint="Remove the line."
            ) from None
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise DataError(f"{path}: line {number} must be a JSON object, got {kind}.", hint="Remove the line.")
        entries.append(entry)
    return entries


def series(entries: Iterable[Mapping[str, Any]]) -> dict[Setting, list[Mapping[str, Any]]]:
    """Entries that may be laid on one line, oldest first: same device, target, threads and batch; those without a
    latency are left out."""
    found: dict[Setting, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if _latency(entry) is not None:
            found.setdefault(_setting(entry), []).append(entry)
    return found


def trend(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """``p50_ms`` of the candidate in every entry measured like `like`, oldest first, and the ``change_points`` in it.

    Args:
        folder: of the history.
        like: an entry; device, target, threads and batch decide.
    """
    return levels(series(read(folder)).get(_setting(like), []))


def levels(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``p50_ms`` of the candidate in every one of a series' entries, and the ``change_points`` in it."""
    values = [value for entry in entries if (value := _latency(entry)) is not None]
    return {"p50_ms": values, "change_points": change_points(values)}


def _setting(entry: Mapping[str, Any]) -> Setting:
    device = entry.get("device")
    name = device.get("id") if isinstance(device, Mapping) else None
    return tuple(str(value) for value in (name, *(entry.get(key) for key in ("target", "threads", "batch"))))


def _latency(entry: Mapping[str, Any]) -> float | None:
    """The candidate's positive median, None where the entry has none."""
    medians = entry.get("latency_ms")
    value = medians.get("candidate") if isinstance(medians, Mapping) else None
    number = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if number and value is not None else None


def change_points(values: Sequence[float]) -> list[int]:
    """Indices at which a new level begins; empty when one level explains the series.

    Args:
        values: positive measurements, oldest first; only the last 300 are looked at.

    >>> change_points([5.0, 5.1, 4.9, 5.0, 5.1, 6.0, 6.1, 5.9, 6.0, 6.1])
    [5]
    """
    skipped = max(0, len(values) - LONGEST)
    x = np.log(np.asarray(values[skipped:], dtype=np.float64))
    n = len(x)
    if n < 2 * SHORTEST:
        return []
    noise = float(np.median(np.abs(np.diff(x)))) or float(np.mean(np.abs(np.diff(x)))) or 1e-12
    penalty, costs = 2 * math.log(n) * noise, _costs(x)
    best, start = [0.0, *[math.inf] * n], [0] * (n + 1)
    for end in range(SHORTEST, n + 1):
        totals = [best[s] + costs[s][end] + penalty for s in range(end - SHORTEST + 1)]
        start[end] = int(np.argmin(totals))
        best[end] = totals[start[end]]
    found, end = [], n
    while (end := start[end]) > 0:
        found.append(skipped + end)
    return found[::-1]


def _costs(x: Any) -> list[list[float]]:
    """``[s][e]``: sum of absolute deviations of x[s:e] from their median."""
    n = len(x)
    table = [[0.0] * (n + 1) for _ in range(n)]
    for s in range(n):
        for e in range(s + 1, n + 1):
            part = x[s:e]
            table[s][e] = float(np.abs(part - np.median(part)).sum())
    return table
