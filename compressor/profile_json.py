"""A profile as the object ``vitrim profile --json`` prints, and back. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compressor.errors import DataError
from compressor.intervals import quantile_interval
from compressor.types import OpRecord, Profile

__all__ = ["from_json", "to_json"]

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


def to_json(profile: Profile) -> dict[str, Any]:
    """The ``vitrim profile --json`` object; an infinite interval bound is null."""
    total = sum(op.time_ms for op in profile.ops)
    ops = [
        {
            **{key: getattr(op, key) for key in ("name", "type", "placement", "precision", "time_ms")},
            "share": op.time_ms / total if total else 0.0,
        }
        for op in profile.ops
    ]
    latency = profile.latency_ms()
    bounds = {name: quantile_interval(profile.samples_ns, q) for name, q in PERCENTILES.items()}
    return {
        "target": profile.target,
        "device": dict(profile.device),
        "runs": len(profile.samples_ns),
        "warmup": profile.warmup,
        "threads": profile.threads,
        "batch": profile.batch,
        "latency_ms": latency,
        "latency_ci95_ms": {name: [_finite(b / 1e6) for b in pair] for name, pair in bounds.items()},
        "images_per_s": profile.batch / latency["mean"] * 1e3,
        "samples_ns": list(profile.samples_ns),
        "load_ms": profile.load_ms,
        "first_run_ms": profile.first_run_ms,
        "peak_rss_bytes": profile.peak_rss_bytes,
        "conditions": dict(profile.conditions),
        "yardstick_ns": list(profile.yardstick_ns),
        "ops": ops,
    }


def from_json(data: Mapping[str, Any]) -> Profile:
    """The Profile of a stored ``vitrim profile --json`` object.

    Raises:
        DataError: a key is missing or of another kind; the file is not to be trusted.
    """
    try:
        return Profile(
            target=str(data["target"]),
            samples_ns=_times(data["samples_ns"]),
            **{key: int(data[key]) for key in ("warmup", "threads", "batch", "peak_rss_bytes")},
            load_ms=_duration(data, "load_ms"),
            first_run_ms=_duration(data, "first_run_ms"),
            device=dict(data["device"]),
            ops=tuple(
                OpRecord(**{k: v for k, v in op.items() if k in OpRecord.__annotations__}) for op in data.get("ops", ())
            ),
            conditions=dict(data.get("conditions", {})),
            yardstick_ns=_times(data["yardstick_ns"]) if data.get("yardstick_ns") else (),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"Stored profile must be the object 'vitrim profile --json' prints: {what}.") from error


def _duration(data: Mapping[str, Any], key: str) -> float:
    value = float(data[key])
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key} must be a duration, got {value}")
    return value


def _times(values: Any) -> tuple[int, ...]:
    times = tuple(int(value) for value in values)
    if not times or min(times) <= 0:
        raise ValueError("times must be positive and at least one")
    return times


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
