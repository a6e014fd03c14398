"""A history that grows by a line, and change points against a search over every split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.errors import DataError
from compressor.history import append, change_points, levels, read, series, trend


def test_entries_come_back_in_the_order_they_were_added(tmp_path: Path) -> None:
    assert read(tmp_path / "none yet") == []
    for i in range(3):
        append(tmp_path / "h", {"ratio": i, "bundle": "ä\n"})
    assert [entry["ratio"] for entry in read(tmp_path / "h")] == [0, 1, 2]
    assert read(tmp_path / "h")[0]["bundle"] == "ä\n"


@pytest.mark.parametrize(("line", "text"), [('{"a": 1', "line 2 must be a JSON object"), ("[1]", "got list")])
def test_a_damaged_line_is_named(tmp_path: Path, line: str, text: str) -> None:
    path = append(tmp_path, {"ratio": 1})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=text):
        read(tmp_path)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = append(tmp_path, {"ratio": 1})
    path.write_bytes(path.read_bytes() + b'{"bundle": "\xff"}\n')
    with pytest.raises(DataError, match="line 2 must be a JSON object"):
        read(tmp_path)


def test_change_points_are_found_where_the_level_changed() -> None:
    rng, exact = np.random.default_rng(0), 0
    for _ in range(20):
        noise = np.exp(0.01 * rng.normal(size=60))
        level = np.repeat([5.0, 5.25, 4.9], 20)  # steps of +5 % and -7 %, noise of 1 %
        exact += change_points((level * noise).tolist()) == [20, 40]
    assert exact >= 15  # now and then the neighbour of the true point fits the noise better


def test_no_change_point_in_noise_alone_nor_at_an_outlier() -> None:
    rng = np.random.default_rng(1)
    false = sum(bool(change_points(np.exp(0.02 * rng.normal(size=60)).tolist())) for _ in range(40))
    assert false <= 2
    values = np.exp(0.01 * rng.normal(size=40))
    values[17] *= 3  # one bad day is not a new level
    assert change_points(values.tolist()) == []


def test_one_change_point_is_where_a_search_over_every_split_puts_it() -> None:
    rng = np.random.default_rng(2)
    x = np.log(np.r_[np.full(13, 2.0), np.full(9, 2.4)] * np.exp(0.01 * rng.normal(size=22)))

    def cost(part: np.ndarray) -> float:
        return float(np.abs(part - np.median(part)).sum())

    best = min(range(1, len(x)), key=lambda s: cost(x[:s]) + cost(x[s:]))
    assert change_points(np.exp(x).tolist()) == [best]


def test_trend_is_of_one_device_only(tmp_path: Path) -> None:
    for i in range(20):
        here = {"device": {"id": "here"}, "latency_ms": {"candidate": 5.0 + 0.01 * (i % 3) + (i >= 12)}}
        append(tmp_path, here)
        append(tmp_path, {"device": {"id": "there"}, "latency_ms": {"candidate": 90.0 * (i + 1)}})
    append(tmp_path, {"device": {"id": "here"}, "latency_ms": {}})  # an entry without a latency is passed over
    found = trend(tmp_path, {"device": {"id": "here"}})
    assert len(found["p50_ms"]) == 20
    assert found["change_points"] == [12]


def test_targets_threads_and_batches_are_series_of_their_own(tmp_path: Path) -> None:
    settings = [("ort", 1, 1), ("openvino", 1, 1), ("ort", 2, 1), ("ort", 1, 8)]
    for i in range(8):
        for factor, (target, threads, batch) in enumerate(settings, 1):
            setting = {"device": {"id": "here"}, "target": target, "threads": threads, "batch": batch}
            append(tmp_path, {**setting, "latency_ms": {"candidate": factor + 0.001 * (i % 2)}})
    found = series(read(tmp_path))
    assert [key[1:] for key in found] == [tuple(map(str, s)) for s in settings]
    assert [levels(entries)["change_points"] for entries in found.values()] == [[]] * 4
    like = {"device": {"id": "here"}, "target": "ort", "threads": 2, "batch": 1}
    assert trend(tmp_path, like)["p50_ms"] == [3 + 0.001 * (i % 2) for i in range(8)]


@pytest.mark.parametrize("ms", [None, "5", -1.0, 0, float("nan"), float("inf"), [5.0]])
def test_entries_without_a_positive_latency_are_left_out(ms: object) -> None:
    assert series([{"device": {"id": "here"}, "latency_ms": {"candidate": ms}}, {"device": 3, "latency_ms": 3}]) == {}


def test_series_too_short_to_tell_have_none() -> None:
    assert change_points([]) == change_points([1.0, 9.0, 1.0]) == []


def test_long_series_are_looked_at_from_the_end() -> None:
    values = [1.0 + 0.001 * (i % 3) for i in range(350)] + [1.5 + 0.001 * (i % 3) for i in range(20)]
    assert change_points(values) == [350]
