"""Latency of sessions. The only file that reads a clock.

Raw samples are kept in the order they were taken; none is discarded without a count. Two sessions are compared only
through `interleave`, which alternates them so that whatever slows the machine slows both.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compressor.device import conditions, fingerprint, peak_rss_bytes, read_counters
from compressor.errors import ConfigError, DataError
from compressor.intervals import Ratio, paired_ratio, quantile_interval
from compressor.types import Array, OpRecord, Profile, Session

__all__ = [
    "ProfileConfig",
    "Stopwatch",
    "faster",
    "from_json",
    "interleave",
    "pinned",
    "profile",
    "sample",
    "throughput",
    "to_json",
]

WINDOW = 5  # inferences per window of the warm-up test
YARDSTICK_RUNS = 50
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
Inputs = Mapping[str, Array]


@dataclass(frozen=True)
class ProfileConfig:
    """How to measure.

    Attributes:
        runs: timed inferences wanted, per session.
        budget_s: stop timing after this long; at least `min_runs` are always taken.
        min_runs: fewest timed inferences.
        warmup: most inferences before timing starts.
        stability: warm-up ends when the medians of two successive windows differ by less than this share.
        threads: threads the session was opened with (recorded, and the number of CPUs pinned to).
        target: name recorded in the profile.
        versions: runtime versions recorded in the device fingerprint.
    """

    runs: int = 200
    budget_s: float = 20.0
    min_runs: int = 10
    warmup: int = 50
    stability: float = 0.02
    threads: int = 1
    target: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.min_runs <= self.runs:
            raise ConfigError(
                f"ProfileConfig.runs must be at least min_runs and that at least 1, got {self.runs}, {self.min_runs}."
            )
        if self.warmup < 0 or self.threads < 1:
            raise ConfigError(f"ProfileConfig.warmup must be >= 0 and threads >= 1, got {self.warmup}, {self.threads}.")
        if not (self.budget_s > 0 and self.stability > 0):
            raise ConfigError(
                f"ProfileConfig.budget_s and stability must be positive, got {self.budget_s}, {self.stability}."
            )


class Stopwatch:
    """Wall seconds by name, for ``timings_s``; entering a name again adds to it.

    >>> watch = Stopwatch()
    >>> with watch("prune"):
    ...     pass
    >>> list(watch.seconds)
    ['prune']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def profile(opener: Callable[[], Session], inputs: Inputs, config: ProfileConfig) -> Profile:
    """Latency distribution of the session that `opener` opens, cold start included.

    Args:
        opener: opens the session; timed as ``load_ms``. Call in a fresh process for a load time and a peak memory that
        are the
            session's own (`compressor.worker`).
        inputs: what every inference gets, (B, ...) arrays by input name; random values are fine for latency.
        config: how to measure.

    Returns:
        The samples with warm-up count, first inference, peak memory of this process, device and what it did meanwhile.
    """
    with pinned(config.threads):
        start = time.perf_counter_ns()
        session = opener()
        loaded = time.perf_counter_ns()
        first_ns = _time_once(session, inputs)
        warmup = _warm_up(session, inputs, config)
        yardstick = _yardstick()
        before = read_counters()
        samples = sample(session, inputs, runs=config.runs, min_runs=config.min_runs, budget_s=config.budget_s)
        during = conditions(before, read_counters(), runs=len(samples))
    return Profile(
        target=config.target,
        samples_ns=samples,
        warmup=warmup + 1,  # The first inference is one of them
        threads=config.threads,
        batch=_batch(inputs),
        load_ms=(loaded - start) / 1e6,
        first_run_ms=first_ns / 1e6,
        peak_rss_bytes=peak_rss_bytes(),
        device=fingerprint(config.versions),
        conditions=during,
        yardstick_ns=yardstick,
    )


def interleave(sessions: Mapping[str, Session], inputs: Inputs, config: ProfileConfig) -> dict[str, tuple[int, ...]]:
    """Nanoseconds per inference of each session, taken in turns: sample r of every session is from the same round.

    Each is warmed up first. The order rotates by one each round and its direction flips after each full rotation, so
    that every session equally often follows every other one. All get the same number of samples: `config.runs`, or what
    the budget (of all sessions together) allows, at least `config.min_runs`.

    Args:
        sessions: by name.
        inputs: what every inference of every session gets.
        config: how to measure.
    """
    if not sessions:
        raise ConfigError("interleave: sessions must hold at least one session, got none.")
    names = tuple(sessions)
    taken: dict[str, list[int]] = {name: [] for name in names}
    with pinned(config.threads):
        for session in sessions.values():
            _warm_up(session, inputs, config)
        deadline = time.perf_counter() + config.budget_s
        for r in range(config.runs):
            if r >= config.min_runs and time.perf_counter() > deadline:
                break
            for name in _order(names, r):
                taken[name].append(_time_once(sessions[name], inputs))
    return {name: tuple(samples) for name, samples in taken.items()}


def faster(candidate: Sequence[int], reference: Sequence[int], *, confidence: float = 0.95) -> Ratio:
    """Candidate time over reference time from interleaved samples; `is_faster` when the whole interval is below 1."""
    return paired_ratio(candidate, reference, confidence)


def sample(
    session: Session, inputs: Inputs, *, runs: int, min_runs: int = 1, budget_s: float = math.inf
) -> tuple[int, ...]:
    """Nanoseconds of up to `runs` successive inferences, fewer (but `min_runs`) once `budget_s` is over; no warm-up."""
    deadline, taken = time.perf_counter() + budget_s, list[int]()
    while len(taken) < runs and (len(taken) < min_runs or time.perf_counter() < deadline):
        taken.append(_time_once(session, inputs))
    return tuple(taken)


def throughput(opener: Callable[[], Session], inputs: Inputs, *, streams: int, seconds: float = 2.0) -> float:
    """Images per second of `streams` sessions that run at the same time, each in a thread of its own.

    Each stream runs until the time is up and finishes the inference it is in; the rate is all images over the time
    until the last stream ended, so a straggler is not hidden.
    """
    if streams < 1 or not seconds > 0:
        raise ConfigError(f"throughput: streams must be at least 1 and seconds positive, got {streams}, {seconds}.")
    sessions = [opener() for _ in range(streams)]
    for session in sessions:
        session.run(inputs)
    counts, ends = [0] * streams, [0.0] * streams
    gate = threading.Barrier(streams + 1)

    def stream(i: int) -> None:
        gate.wait()
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            sessions[i].run(inputs)
            counts[i] += 1
        ends[i] = time.perf_counter()

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) * _batch(inputs) / (max(ends) - start)


@contextmanager
def pinned(cpus: int) -> Iterator[None]:
    """Restrict this process to its first `cpus` allowed CPUs, so that the scheduler does not move it while it is timed.

    Where the system has no affinity, or allows no more CPUs than that, nothing is changed. Threads a runtime started
    before keep their own affinity.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) <= cpus:
        yield
        return
    os.sched_setaffinity(0, allowed[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# --------------------------------------------------------------------------- JSON


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
            load_ms=float(data["load_ms"]),
            first_run_ms=float(data["first_run_ms"]),
            device=dict(data["device"]),
            ops=tuple(
                OpRecord(**{k: v for k, v in op.items() if k in OpRecord.__annotations__}) for op in data.get("ops", ())
            ),
            conditions=dict(data.get("conditions", {})),
            yardstick_ns=_times(data["yardstick_ns"]) if data.get("yardstick_ns") else (),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"Stored profile must be the object 'vitrim profile --json' prints: {what}.") from error


def _times(values: Any) -> tuple[int, ...]:
    times = tuple(int(value) for value in values)
    if not times or min(times) <= 0:
        raise ValueError("times must be positive and at least one")
    return times


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --------------------------------------------------------------------------- the clock


def _time_once(session: Session, inputs: Inputs) -> int:
    start = time.perf_counter_ns()
    session.run(inputs)
    return time.perf_counter_ns() - start


def _warm_up(session: Session, inputs: Inputs, config: ProfileConfig) -> int:
    """Inferences made until two successive windows agree, or until `config.warmup` or a quarter of the time budget is used."""
    deadline, done = time.perf_counter() + config.budget_s / 4, 0
    previous = math.inf
    while done + WINDOW <= config.warmup and time.perf_counter() < deadline:
        current = float(np.median([_time_once(session, inputs) for _ in range(WINDOW)]))
        done += WINDOW
        if abs(current - previous) < config.stability * current:
            break
        previous = current
    return done


def _order(names: tuple[str, ...], r: int) -> tuple[str, ...]:
    """Names of round r: rotated by one each round, direction flipped after each full rotation.

    >>> [_order(("a", "b"), r) for r in range(4)]
    [('a', 'b'), ('b', 'a'), ('b', 'a'), ('a', 'b')]
    """
    turn, shift = divmod(r, len(names))
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if turn % 2 else rotated


def _yardstick() -> tuple[int, ...]:
    """Times of fixed single-threaded work, so that a stored profile can tell whether the machine drifted since."""
    x, taken = np.linspace(-4.0, 4.0, 65536, dtype=np.float32), list[int]()
    for _ in range(YARDSTICK_RUNS):
        start = time.perf_counter_ns()
        np.exp(x)
        taken.append(time.perf_counter_ns() - start)
    return tuple(taken)


def _batch(inputs: Inputs) -> int:
    return next((int(value.shape[0]) for value in inputs.values() if value.ndim), 1)
