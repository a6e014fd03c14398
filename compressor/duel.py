"""Two artifacts timed against each other in pairs of fresh processes, until the gate has decided.

In every pair both processes are alive and infer in turns, so that they share whatever the machine does; who starts
first and who infers first is drawn by coin, and the order alternates from turn to turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from math import exp, log
from random import Random
from statistics import median
from typing import Any

from compressor import errors
from compressor.affinity import pinned
from compressor.errors import TargetUnavailable
from compressor.gate import GateConfig, GateVerdict, conclude, next_step
from compressor.profile import ProfileConfig, timer
from compressor.profile_json import from_json
from compressor.types import Profile, Progress

__all__ = ["Contender", "Duel", "DuelConfig", "Pair", "Worker", "duel", "profile_fresh", "silent"]

OPEN_BUNDLE = "compressor.worker:open_bundle"
TURN_MS = 2.0  # a turn is one inference, or as many as take this long: talking to a process costs about 0.1 ms
Command = Sequence[str]
LOCAL: Command = (sys.executable, "-m", "compressor.worker")


@dataclass(frozen=True)
class Contender:
    """What a worker opens: a function ``module:name`` returning (opener, inputs), its arguments, and where it runs.

    Attributes:
        arguments: of `opener`; for a bundle ``path, target, threads, batch``.
        opener: see `compressor.worker.open_bundle`.
        command: starts the worker; anything that speaks its protocol on stdin and stdout.
    """

    arguments: Mapping[str, Any]
    opener: str = OPEN_BUNDLE
    command: Command = LOCAL


@dataclass(frozen=True)
class DuelConfig:
    """How a pair is timed and when to give up.

    Attributes:
        threads: of both sessions.
        turns: turns of each side in a pair, fewer (at least `min_turns`) where they would take longer than `pair_s`.
        budget_s: no pair is begun after this long.
    """

    threads: int = 1
    turns: int = 60
    min_turns: int = 5
    pair_s: float = 0.8
    warmup: int = 20
    budget_s: float = 240.0


@dataclass(frozen=True)
class Pair:
    """Nanoseconds of one pair of processes, turn by turn; a turn of several inferences is their median."""

    candidate_ns: tuple[float, ...]
    baseline_ns: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """exp of the median over turns of log(candidate / baseline): swapping the names gives its reciprocal."""
        return exp(median(log(c / b) for c, b in zip(self.candidate_ns, self.baseline_ns, strict=True)))


@dataclass(frozen=True)
class Duel:
    """The verdict and everything it was reached from: one list of pairs per run."""

    verdict: GateVerdict
    runs: tuple[tuple[Pair, ...], ...]
    seconds: float

    def p50_ms(self) -> dict[str, float]:
        """Median latency of both sides over all pairs."""
        pairs = [pair for run in self.runs for pair in run]
        both = {
            "candidate": [t for p in pairs for t in p.candidate_ns],
            "baseline": [t for p in pairs for t in p.baseline_ns],
        }
        return {name: median(times) / 1e6 for name, times in both.items()}


class Worker:
    """A `compressor.worker` that has been started; a context manager, so that no process outlives its use.

    Call `hear` once before the first `ask`: workers may get ready beside each other.

    Raises:
        VitrimError: whatever stopped the worker, as the class it was there.
        TargetUnavailable: the worker ended without saying why; its last words are in the message.
    """

    def __init__(self, contender: Contender, config: Mapping[str, Any]) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close()
        pipe, command = subprocess.PIPE, list(contender.command)
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, encoding="utf-8"
        )
        self._tell({"opener": contender.opener, "arguments": dict(contender.arguments), "config": dict(config)})

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer to one request of its protocol."""
        self._tell(request)
        return self.hear()

    def _tell(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # It has ended; what it said last is still to be heard
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next answer; the first one says that the session is open and warm."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": self._last_words()}
        if "error" in answer:
            said = answer["error"]
            raise getattr(errors, str(said["code"]), TargetUnavailable)(said["message"], hint=said["hint"])
        return answer

    def _last_words(self) -> dict[str, str]:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["nothing"]
        message = f"worker: must answer every request, got exit code {code} after: {lines[-1][:300]}."
        return {"code": "TargetUnavailable", "message": message, "hint": "Run the same command again with -v."}

    def close(self) -> None:
        """End the process: politely by end of input, then by force."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a duel that nobody watches."""


def duel(
    candidate: Contender,
    baseline: Contender,
    gate: GateConfig,
    config: DuelConfig | None = None,
    progress: Progress = silent,
) -> Duel:
    """The verdict on `candidate` against `baseline`: pairs are measured until the gate has decided or the budget is
    spent.

    Args:
        candidate: what may have become slower.
        baseline: what it is compared with.
        gate: limit and confidence.
        config: how a pair is timed.
        progress: called after every pair with ("pairs", pairs measured, pairs at most).
    """
    config, elapsed = config or DuelConfig(), timer()
    coins, runs = Random(gate.seed), [list[Pair]()]
    with pinned(config.threads):  # both sides of every pair inherit the same CPUs
        while (step := next_step([[p.ratio for p in run] for run in runs], gate)) in ("measure", "confirm"):
            if step == "confirm":
                runs.append([])
            if runs[0] and elapsed() > config.budget_s:
                break
            runs[-1].append(_pair(candidate, baseline, coins, config))
            progress("pairs" if len(runs) == 1 else "pairs, confirming", len(runs[-1]), gate.max_pairs)
    progress("pairs", gate.max_pairs, gate.max_pairs)  # most often it needs far fewer
    kept = [run for run in runs if run]
    verdict = conclude([[p.ratio for p in run] for run in kept], gate)
    return Duel(verdict, tuple(tuple(run) for run in kept), elapsed())


def profile_fresh(contender: Contender, config: ProfileConfig, *, ops: bool = False) -> Profile:
    """The profile of `contender` in a process of its own, so that load time and peak memory are the session's.

    Args:
        contender: what to profile.
        config: how.
        ops: whether to add the per-op table.
    """
    with Worker(contender, {**asdict(config), "versions": dict(config.versions)}) as worker:
        worker.hear()
        return from_json(worker.ask({"profile": {"ops": ops}}))


def _pair(candidate: Contender, baseline: Contender, coins: Random, config: DuelConfig) -> Pair:
    contenders = {"candidate": candidate, "baseline": baseline}
    start, turn = _shuffled(coins, list(contenders)), _shuffled(coins, list(contenders))
    settings = {"threads": config.threads, "warmup": config.warmup}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(contenders[name], settings)) for name in start}
        for worker in workers.values():
            worker.hear()
        # The same number of inferences for both sides, set by the slower one
        ms = max(min(worker.ask({"runs": 3})["samples_ns"]) for worker in workers.values()) / 1e6
        runs = max(1, min(64, round(TURN_MS / ms)))
        turns = max(config.min_turns, min(config.turns, round(1e3 * config.pair_s / (2 * runs * ms))))
        for _ in range(turns):
            for name in turn:
                taken[name].append(median(workers[name].ask({"runs": runs})["samples_ns"]))
            turn.reverse()
    return Pair(tuple(taken["candidate"]), tuple(taken["baseline"]))


def _shuffled(coins: Random, names: list[str]) -> list[str]:
    coins.shuffle(names)
    return names
