"""Pairs of real worker processes: the protocol, its failures, and verdicts on differences no noise can hide."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.duel import Contender, DuelConfig, Pair, Worker, duel, profile_fresh
from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.gate import GateConfig
from compressor.profile import ProfileConfig

ROOT = Path(__file__).parents[2]
COMMAND = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "compressor.worker")
FAST = DuelConfig(turns=5, warmup=0, pair_s=0.05)


def contender(function: str, **arguments: object) -> Contender:
    return Contender(arguments, f"tests.core.openers:{function}", COMMAND)


def children() -> set[str]:
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return {line for line in listed.stdout.splitlines() if "compressor.worker" in line}


def test_worker_answers_in_spite_of_what_the_runtime_prints() -> None:
    with Worker(contender("sleeper", ms=0.1), {"warmup": 0}) as worker:
        ready = worker.hear()
        assert ready.keys() == {"load_ms", "first_run_ms", "warmup"}
        assert len(worker.ask({"runs": 7})["samples_ns"]) == 7
        profile = worker.ask({"profile": {"ops": True}})
        assert profile["ops"][0]["precision"] == "int8"
    assert not children()


def test_profile_fresh_is_of_a_process_of_its_own() -> None:
    result = profile_fresh(
        contender("sleeper", ms=0.1), ProfileConfig(runs=10, target="sleep", versions={"sleep": "1"}), ops=True
    )
    assert len(result.samples_ns) == 10
    assert result.target == "sleep"
    assert result.device["versions"]["sleep"] == "1"
    assert result.ops[0].name == "blocks.0.fc1"
    assert result.peak_rss_bytes < 120 << 20  # numpy and this package, not the test process with torch


def test_worker_raises_what_stopped_it_as_the_class_it_was() -> None:
    with (
        pytest.raises(BundleError, match="'x' is listed in the manifest but missing") as caught,
        Worker(contender("damaged"), {}) as worker,
    ):
        worker.hear()
    assert caught.value.hint == "Copy the bundle again."
    assert not children()


@pytest.mark.parametrize(
    ("opener", "text"),
    [
        (contender("crash"), r"got exit code 132 after: Illegal instruction in kernel_17"),
        (contender("nothing_of_that_name"), "got exit code 1 after: AttributeError"),
        (
            Contender({}, "x:y", ("sh", "-c", "echo no python here >&2; exit 127")),
            "exit code 127 after: no python here",
        ),
    ],
)
def test_worker_that_dies_is_reported_with_its_last_words(opener: Contender, text: str) -> None:
    with pytest.raises(TargetUnavailable, match=text), Worker(opener, {}) as worker:
        worker.hear()


def test_worker_that_dies_in_the_middle_of_a_duel_ends_it_and_leaves_nothing_behind() -> None:
    with pytest.raises(TargetUnavailable, match="exit code 9"):
        duel(contender("crash_later", after=8), contender("sleeper", ms=0.1), GateConfig(), FAST)
    assert not children()


def test_worker_is_ended_by_force_when_it_does_not_listen() -> None:
    worker = Worker(Contender({}, "x:y", ("sh", "-c", "trap '' TERM; exec sleep 60")), {})
    worker._process.wait = _impatient(worker._process.wait)  # type: ignore[method-assign]
    worker.close()
    assert worker._process.returncode == -9


def _impatient(wait: Callable[..., int]) -> Callable[..., int]:
    return lambda timeout=None: wait(timeout=min(0.2, timeout)) if timeout else wait()


def test_pair_ratio_is_the_median_over_turns() -> None:
    assert Pair((3.0, 4.0, 100.0), (2.0, 2.0, 2.0)).ratio == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_pair_with_the_names_swapped_has_the_reciprocal_ratio(turns: int) -> None:
    """Symmetry of the noise is what the gate's error rates rest on; the arithmetic median of two is not symmetric."""
    one, other = (1.0, 1.2, 1.7, 1.1)[:turns], (1.0, 1.0, 1.3, 1.9)[:turns]
    assert Pair(one, other).ratio * Pair(other, one).ratio == pytest.approx(1.0, rel=1e-12)


def test_duel_fails_what_is_slower_by_half_and_passes_what_is_the_same() -> None:
    """3 ms against 2 ms with a limit of 1.2: time slices of a busy machine are subtracted, timers are good to 0.1 ms."""
    config = GateConfig(max_regression=0.2, confidence=0.9)
    slower = duel(contender("sleeper", ms=3.0), contender("sleeper", ms=2.0), config, FAST)
    assert slower.verdict.verdict == "fail"
    assert len(slower.runs) == 2
    assert slower.verdict.confirmed
    assert slower.verdict.ratio_ci[0] > 1.2
    same = duel(contender("sleeper", ms=2.0), contender("sleeper", ms=2.0), config, FAST)
    assert same.verdict.verdict == "pass"
    assert len(same.runs) == 1
    assert same.p50_ms()["baseline"] >= 2.0


def test_duel_out_of_time_is_inconclusive_and_says_with_how_many_pairs() -> None:
    config = DuelConfig(turns=2, min_turns=1, warmup=0, budget_s=1e-9)
    found = duel(contender("sleeper", ms=0.1), contender("sleeper", ms=0.1), GateConfig(), config)
    assert found.verdict.verdict == "inconclusive"
    assert found.verdict.pairs == 1


def test_duel_out_of_time_for_the_confirmation_says_so() -> None:
    """Three times slower, and the time is over after the first pair, which at 50 % confidence has seen it."""
    config = DuelConfig(turns=2, min_turns=1, warmup=0, budget_s=1e-9)
    found = duel(contender("sleeper", ms=6.0), contender("sleeper", ms=2.0), GateConfig(confidence=0.5), config)
    assert (found.verdict.verdict, found.verdict.pairs, len(found.runs)) == ("inconclusive", 1, 1)
    assert "the time ended before a second could confirm it" in found.verdict.sentence


def test_worker_refuses_a_config_that_cannot_work() -> None:
    with (
        pytest.raises(ConfigError, match="warmup must be >= 0"),
        Worker(contender("sleeper", ms=1.0), {"warmup": -1}) as worker,
    ):
        worker.hear()
