"""Latency of sessions. The only file of `compressor` that reads a clock.

Raw samples are kept in the order they were taken; none is discarded without a count. Two sessions are compared only
through `interleave`, which alternates them so that whatever slows the machine slows both.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from compressor.affinity import pinned
from compressor.device import QueueClock, conditions, fingerprint, peak_rss_bytes, read_counters
from compressor.errors import ConfigError
from compressor.intervals import Ratio, paired_ratio
from compressor.types import Array, Profile, Session

__all__ = [
    "Prepared",
    "ProfileConfig",
    "Stopwatch",
    "copy_bytes_per_s",
    "faster",
    "interleave",
    "measure",
    "prepare",
    "profile",
    "sample",
    "sample_undisturbed",
    "throughput",
    "timer",
]

WINDOW = 5  # inferences per window of the warm-up test
YARDSTICK_RUNS = 50
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


@dataclass(frozen=True)
class Prepared:
    """A warm session and what its cold start took."""

    session: Session
    load_ms: float
    first_run_ms: float
    warmup: int  # inferences made, the first one included


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
        opener: opens the session; timed as ``load_ms``. For a load time and a peak memory that are the session's own,
            call in a fresh process: `compressor.duel.profile_fresh`.
        inputs: what every inference gets, (B, ...) arrays by input name; random values are fine for latency.
        config: how to measure.

    Returns:
        The samples with warm-up count, first inference, peak memory of this process, device and what it did meanwhile.
    """
    with pinned(config.threads):
        return measure(prepare(opener, inputs, config), inputs, config)


def prepare(opener: Callable[[], Session], inputs: Inputs, config: ProfileConfig) -> Prepared:
    """The session that `opener` opens, run until warm, with what its cold start took."""
    start = time.perf_counter_ns()
    session = opener()
    loaded = time.perf_counter_ns()
    first_ns = _time_once(session, inputs)
    warmup = 1 + _warm_up(session, inputs, config)  # The first inference is one of them
    return Prepared(session, (loaded - start) / 1e6, first_ns / 1e6, warmup)


def measure(prepared: Prepared, inputs: Inputs, config: ProfileConfig) -> Profile:
    """The profile of a session that is warm already."""
    yardstick = _yardstick()
    before = read_counters()
    samples = sample(prepared.session, inputs, runs=config.runs, min_runs=config.min_runs, budget_s=config.budget_s)
    during = conditions(before, read_counters(), runs=len(samples))
    return Profile(
        target=config.target,
        samples_ns=samples,
        warmup=prepared.warmup,
        threads=config.threads,
        batch=_batch(inputs),
        load_ms=prepared.load_ms,
        first_run_ms=prepared.first_run_ms,
        peak_rss_bytes=peak_rss_bytes(),
        device=fingerprint(config.versions),
        conditions=during,
        yardstick_ns=yardstick,
    )


def interleave(sessions: Mapping[str, Session], inputs: Inputs, config: ProfileConfig) -> dict[str, tuple[int, ...]]:
    """Undisturbed nanoseconds per inference (see `sample_undisturbed`) of each session, taken in turns: sample r of
    every session is from the same round.

    Each is warmed up first. The rounds' orders are a Williams design: within a round, every session equally often follows
    every other one, whose traces in the caches it pays for. All get the same number of samples: `config.runs`, or what
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
    for session in sessions.values():
        _warm_up(session, inputs, config)
    deadline = time.perf_counter() + config.budget_s
    for r in range(config.runs):
        if r >= config.min_runs and time.perf_counter() > deadline:
            break
        for name in _order(names, r):
            taken[name] += sample_undisturbed(sessions[name], inputs, runs=1)
    return {name: tuple(samples) for name, samples in taken.items()}


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by one thread copying 64 MB, the best of five: what memory gives at most."""
    source = np.ones(8 << 20)
    copy, best = np.empty_like(source), math.inf
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(copy, source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def timer() -> Callable[[], float]:
    """A function that returns the seconds since now, for callers that must keep to a budget."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


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


def sample_undisturbed(session: Session, inputs: Inputs, *, runs: int) -> tuple[int, ...]:
    """Nanoseconds of `runs` successive inferences, less the time the calling thread waited for a CPU.

    On a shared machine that wait comes in whole time slices and hides the artifact's own time: with five busy processes
    on two CPUs, two networks 5.0 % apart differ by 3 % in wall time and by 5.1 % without the wait. For comparing only:
    a `Profile` keeps wall time and reports the wait beside it.
    """
    taken = list[int]()
    with QueueClock() as waited:
        for _ in range(runs):
            start = time.perf_counter_ns()
            before = waited()
            session.run(inputs)
            wait = waited() - before  # Read inside the timed span, so it never exceeds it
            taken.append(time.perf_counter_ns() - start - wait)
    return tuple(taken)


def throughput(opener: Callable[[], Session], inputs: Inputs, *, streams: int, seconds: float = 2.0) -> float:
    """Images per second of `streams` sessions that run at the same time, each in a thread of its own.

    Each stream runs until the time is up and finishes the inference it is in; the rate is all images over the time
    until the last stream ended, so a straggler is not hidden. Whatever a stream raises is raised here.
    """
    if streams < 1 or not seconds > 0:
        raise ConfigError(f"throughput: streams must be at least 1 and seconds positive, got {streams}, {seconds}.")
    sessions = [opener() for _ in range(streams)]
    for session in sessions:
        session.run(inputs)
    gate = threading.Barrier(streams + 1)

    def stream(session: Session) -> tuple[int, float]:
        gate.wait()
        deadline, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < deadline:
            session.run(inputs)
            count += 1
        return count, time.perf_counter()

    with ThreadPoolExecutor(streams) as pool:
        running = [pool.submit(stream, session) for session in sessions]
        gate.wait()
        start = time.perf_counter()
        counts, ends = zip(*(future.result() for future in running), strict=True)
    rate: float = sum(counts) * _batch(inputs) / (max(ends) - start)
    return rate


# --------------------------------------------------------------------------- the clock


def _time_once(session: Session, inputs: Inputs) -> int:
    start = time.perf_counter_ns()
    session.run(inputs)
    return time.perf_counter_ns() - start


def _warm_up(session: Session, inputs: Inputs, config: ProfileConfig) -> int:
    """Inferences made until two successive windows agree, `config.warmup` or a quarter of the budget is used."""
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
    """Names of round r: over n rounds every name has every place; over n (n even) or 2n, every one before it.

    Source: E. J. Williams 1949, Australian Journal of Scientific Research A 2, 149-168.

    >>> ["".join(_order(("a", "b", "c", "d"), r)) for r in range(4)]
    ['abdc', 'bcad', 'cdba', 'dacb']
    """
    turn, shift = divmod(r, len(names))
    zigzag = (-(i // 2) if i % 2 == 0 else i // 2 + 1 for i in range(len(names)))  # 0, 1, -1, 2, -2 ...
    row = tuple(names[(shift + step) % len(names)] for step in zigzag)
    return row[::-1] if turn % 2 else row


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
