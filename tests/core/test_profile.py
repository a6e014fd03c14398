"""What a profile counts, keeps and orders. Nothing here asserts how long anything took."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from compressor.errors import ConfigError, DataError
from compressor.profile import (
    ProfileConfig,
    Stopwatch,
    faster,
    interleave,
    prepare,
    profile,
    sample,
    sample_undisturbed,
    throughput,
)
from compressor.profile_json import from_json, to_json
from compressor.types import Array, OpRecord, Profile, Session

INPUTS = {"x": np.zeros((2, 3), np.float32)}
QUICK = ProfileConfig(runs=12, min_runs=3, warmup=20, target="spin")


class Spin:
    """A session that does a fixed amount of work and writes its name into a log shared with others."""

    def __init__(self, name: str = "spin", log: list[str] | None = None, work: int = 5) -> None:
        self.name, self.log, self.work = name, [] if log is None else log, work

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.log.append(self.name)
        total = np.zeros(64)
        for _ in range(self.work):
            total = np.sin(total + 1)
        return {"y": total}

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        del inputs  # Unused
        return (OpRecord("blocks.0.fc1", "MatMul", "CPU", "fp32", 3.0), OpRecord("head", "MatMul", "CPU", "fp32", 1.0))


class Growing(Spin):
    """Does half as much again in every inference, so that no two windows are alike."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.work += 1 + self.work // 2
        return super().run(inputs)


def some_profile(**changes: Any) -> Profile:
    base: dict[str, Any] = {
        "target": "ort",
        "samples_ns": (3_000_000, 1_000_000, 2_000_000),
        "warmup": 4,
        "threads": 1,
        "batch": 2,
        "load_ms": 5.0,
        "first_run_ms": 6.0,
        "peak_rss_bytes": 7,
        "device": {"id": "abc"},
        "yardstick_ns": (10, 11),
    }
    return Profile(**{**base, **changes})


def test_profile_counts_every_inference_it_made() -> None:
    session = Spin()
    result = profile(lambda: session, INPUTS, QUICK)
    assert isinstance(session, Session)
    assert len(result.samples_ns) == 12
    assert result.warmup + len(result.samples_ns) == len(session.log)
    assert result.batch == 2
    assert min(result.samples_ns) > 0
    assert result.load_ms > 0
    assert result.first_run_ms > 0
    assert result.peak_rss_bytes > 1 << 20
    assert result.device["cpu"]["logical"] >= 1
    assert "waited_ms" in result.conditions


def test_warm_up_stops_at_its_limit_when_nothing_settles() -> None:
    session = Growing()
    prepared = prepare(lambda: session, INPUTS, ProfileConfig(warmup=17))
    assert prepared.warmup == len(session.log) == 1 + 15  # three whole windows of five fit into 17
    settled = prepare(Spin, INPUTS, ProfileConfig(warmup=500, stability=1e9))  # Control: anything is stable enough
    assert settled.warmup == 1 + 10


def test_sample_takes_the_fewest_asked_for_when_there_is_no_time() -> None:
    assert len(sample(Spin(), INPUTS, runs=50, min_runs=4, budget_s=1e-9)) == 4
    assert len(sample(Spin(), INPUTS, runs=50, min_runs=4)) == 50


def test_sample_undisturbed_is_never_zero_or_less() -> None:
    assert min(sample_undisturbed(Spin(), INPUTS, runs=200)) > 0


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_interleave_gives_every_session_the_same_number_and_every_place(names: tuple[str, ...]) -> None:
    log: list[str] = []
    rounds = 4 * len(names)
    taken = interleave({n: Spin(n, log) for n in names}, INPUTS, ProfileConfig(runs=rounds, min_runs=1, warmup=0))
    assert {name: len(samples) for name, samples in taken.items()} == dict.fromkeys(names, rounds)
    timed = [log[i : i + len(names)] for i in range(0, len(log), len(names))]
    assert all(sorted(turn) == sorted(names) for turn in timed)  # every round has every session once
    for place in range(len(names)):
        seen = [turn[place] for turn in timed]
        assert {seen.count(name) for name in names} == {4}  # and every session is equally often in every place


@pytest.mark.parametrize("count", range(2, 8))
def test_every_session_equally_often_follows_every_other_one(count: int) -> None:
    log: list[str] = []
    names = "abcdefg"[:count]
    interleave({n: Spin(n, log) for n in names}, INPUTS, ProfileConfig(runs=2 * count, min_runs=1, warmup=0))
    rounds = ["".join(log[i : i + count]) for i in range(0, len(log), count)]
    followed = Counter(pair for turn in rounds for pair in itertools.pairwise(turn))
    assert set(followed.values()) == {2} and len(followed) == count * (count - 1)


def test_interleave_alternates_and_not_one_after_the_other() -> None:
    log: list[str] = []
    interleave({n: Spin(n, log) for n in ("a", "b")}, INPUTS, ProfileConfig(runs=20, min_runs=1, warmup=0))
    followers = [b for a, b in itertools.pairwise(log) if a == "a"]
    assert followers.count("b") > 10  # one after the other would give 1


def test_faster_reads_the_ratio_of_pairs() -> None:
    rng = np.random.default_rng(0)
    reference = (1e6 * rng.lognormal(sigma=0.3, size=60)).astype(int)
    found = faster((0.9 * reference).astype(int).tolist(), reference.tolist())
    assert found.is_faster
    assert found.ratio == pytest.approx(0.9, abs=1e-4)  # nanoseconds are rounded to integers
    assert not faster(reference.tolist(), reference.tolist()).is_faster


def test_throughput_counts_images_of_all_streams() -> None:
    sessions: list[Spin] = []

    def opener() -> Spin:
        sessions.append(Spin())
        return sessions[-1]

    rate = throughput(opener, INPUTS, streams=3, seconds=0.05)
    assert len(sessions) == 3
    assert rate > 0
    assert all(len(session.log) > 1 for session in sessions)


def test_throughput_is_no_number_when_a_stream_fails() -> None:
    class Broken(Spin):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            if len(self.log) > 1:
                raise RuntimeError("the device is gone")
            return super().run(inputs)

    opened = iter([Spin(), Broken()])
    with pytest.raises(RuntimeError, match="the device is gone"):
        throughput(lambda: next(opened), INPUTS, streams=2, seconds=0.05)


def test_stopwatch_adds_up_by_name_even_when_the_work_fails() -> None:
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch("prune"):
        raise ZeroDivisionError
    first = watch.seconds["prune"]
    with watch("prune"):
        pass
    assert watch.seconds["prune"] > first > 0


def test_to_json_has_the_contracts_keys_and_is_strict_json() -> None:
    ops = Spin().ops({})
    text = json.dumps(to_json(some_profile(ops=ops)), allow_nan=False)  # three samples: bounds are infinite, so null
    data = json.loads(text)
    keys = "target device runs warmup threads batch latency_ms samples_ns load_ms first_run_ms peak_rss_bytes ops"
    assert set(keys.split()) <= data.keys()
    assert data["latency_ms"].keys() == {"min", "p50", "p90", "p99", "mean"}
    assert data["latency_ms"]["p50"] == 2.0
    assert data["samples_ns"] == [3_000_000, 1_000_000, 2_000_000]  # as taken, not sorted
    assert data["latency_ci95_ms"]["p50"] == [None, None]
    assert [op["share"] for op in data["ops"]] == [0.75, 0.25]
    assert data["ops"][0].keys() >= {"name", "type", "placement", "time_ms", "share"}
    assert data["images_per_s"] == 1000.0


def test_from_json_is_the_inverse_of_to_json() -> None:
    original = some_profile(ops=Spin().ops({}), conditions={"waited_ms": 1.0})
    assert from_json(json.loads(json.dumps(to_json(original)))) == original


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"samples_ns": []}, "times must be positive and at least one"),
        ({"samples_ns": [0]}, "times must be positive and at least one"),
        ({"samples_ns": "soon"}, "invalid literal"),
        ({"samples_ns": None}, "not iterable"),
        ({"threads": "many"}, "invalid literal"),
        ({"device": 3}, "not iterable"),
        ({"ops": [{"name": "x"}]}, "missing 4 required"),
        ({"ops": [7]}, "no attribute"),
        ({"load_ms": math.nan}, "load_ms"),
    ],
)
def test_from_json_refuses_what_is_not_a_profile(change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        from_json({**to_json(some_profile()), **change})


def test_from_json_names_the_missing_key() -> None:
    data = to_json(some_profile())
    del data["threads"]
    with pytest.raises(DataError, match="key 'threads' is missing"):
        from_json(data)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"runs": 3, "min_runs": 4}, "runs must be at least min_runs and that at least 1, got 3, 4"),
        ({"warmup": -1}, "warmup must be >= 0 and threads >= 1, got -1"),
        ({"budget_s": 0.0}, "budget_s and stability must be positive, got 0.0"),
        ({"stability": math.nan}, "stability must be positive"),
    ],
)
def test_config_refuses_what_cannot_work(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ProfileConfig(**change)
