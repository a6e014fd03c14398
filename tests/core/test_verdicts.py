"""`compress` says so when a pruned model is no faster on a target."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from compressor import show
from compressor.report import render
from compressor.types import latency_ms
from compressor.verdicts import pruning_speed


def samples(ms: float, seed: int, count: int = 60) -> list[int]:
    return (1e6 * ms * np.random.default_rng(seed).lognormal(sigma=0.05, size=count)).astype(int).tolist()


def result(pruning: dict[str, Any] | None) -> dict[str, Any]:
    """What `compress` answers, as far as a person sees it."""
    times = latency_ms(tuple(samples(2.0, 1)))
    target = {"name": "ort", "precision": "fp32", "size_bytes": 1_000_000, "speedup": 1.0, "reason": "fp32 kept."}
    target |= {"latency_ms": times, "reference_latency_ms": times, "reverted": False, "accuracy": {"top1": None}}
    target |= {"parity": {"max_abs": 0.0, "cosine": 1.0, "agreement": 100.0, "count": 8}, "pruning": pruning}
    target |= {"int8_mac_share": 0.0, "kept_float": []}
    sizes = {"params": 10, "macs": 20, "top1": None, "top1_ci95": None}
    compressed = {**sizes, "agreement": 99.0, "n": 8, "evaluated_on": "calibration"}
    rest = {"model": "demo", "compiled": [], "plans": [], "timings_s": {"prune": 1.0}, "bundle": "b"}
    return {**rest, "reference": sizes, "compressed": compressed, "targets": [target]}


@pytest.mark.parametrize("pruned_ms", [2.0, 2.4])
def test_pruning_that_is_not_faster_is_said_with_its_interval(pruned_ms: float) -> None:
    found = pruning_speed("ort", samples(pruned_ms, 1), samples(2.0, 2))
    assert not found["faster"] and found["ratio"] == pytest.approx(pruned_ms / 2, rel=0.05)
    low, high = found["ci95"]
    assert low < found["ratio"] < high and high > 1
    said = f"Pruning is not measurably faster on ort: in float it takes {found['ratio']:.2f}x the unpruned model's time"
    assert found["sentence"].startswith(f"{said} (95 % interval {low:.2f} to {high:.2f}).")


def test_pruning_that_pays_needs_no_sentence() -> None:
    found = pruning_speed("ort", samples(1.5, 1), samples(2.0, 2))
    assert found["faster"] and found["sentence"] == "" and found["ci95"][1] < 1


def test_too_few_runs_prove_nothing() -> None:
    found = pruning_speed("ort", samples(1.0, 1, 3), samples(2.0, 2, 3))
    assert not found["faster"] and found["ci95"] is None and "too few runs for an interval" in found["sentence"]
    json.loads(json.dumps(found, allow_nan=False))


def test_the_terminal_and_the_page_show_the_sentence_only_when_there_is_one() -> None:
    slow = pruning_speed("ort", samples(2.4, 1), samples(2.0, 2))
    assert slow["sentence"] in show.compressed(result(slow))
    assert "Pruning is not measurably faster on ort" in render(result(slow))
    for quiet in (None, pruning_speed("ort", samples(1.0, 1), samples(2.0, 2))):
        assert not any("measurably" in str(line) for line in show.compressed(result(quiet)))
        assert "measurably" not in render(result(quiet))
