"""Peaks measured through a target, and the parts table of a profile. No assertion on how fast this machine is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import targets
from compressor.lower import lower
from compressor.peaks import measure_peaks, parts
from compressor.types import BuildOptions, OpRecord, Precision
from tests.models import BASE, random_model

CASES = [("ort", "w8a8", {"fp32", "int8"}), ("openvino", "w8a8", {"fp32", "int8"}), ("ort", "fp32", {"fp32"})]


@pytest.mark.parametrize(("target", "precision", "recorded"), CASES)
def test_peaks_are_measured_in_the_precision_that_really_ran(
    target: str, precision: Precision, recorded: set[str]
) -> None:
    if not targets.get(target).available().available:
        pytest.skip(f"{target} is not installed")
    found = measure_peaks(target, precision, threads=1)
    assert set(found.macs_per_s) == recorded
    # Slower than one multiplication per microsecond, or faster than any core, would be a wrong unit
    assert all(1e6 < rate < 1e14 for rate in found.macs_per_s.values())
    assert 1e6 < found.bytes_per_s < 1e13


def test_parts_carry_an_efficiency_where_something_is_multiplied(tmp_path: Path) -> None:
    model, target = random_model(BASE), targets.get("ort")
    artifact = target.build(lower(model, target.CAPABILITIES), BuildOptions(tmp_path))
    ops = target.open(artifact).ops(
        {artifact.inputs[0].name: np.zeros((1, BASE.in_chans, *BASE.image_size), np.float32)}
    )
    found = {(part["block"], part["part"]): part for part in parts(ops, BASE, artifact, threads=1, batch=1)}
    assert found[0, "fc1"]["efficiency"] > 0
    assert found[0, "norm"]["efficiency"] is None
    elsewhere = [OpRecord(op.name, op.type, "NPU", op.precision, op.time_ms) for op in ops]
    away = parts(elsewhere, BASE, artifact, threads=1, batch=1)
    assert all(part["efficiency"] is None for part in away)  # no vendor compiler is started for a table
