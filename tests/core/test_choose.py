"""Which candidate a contest keeps, from hand-made times whose right answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.candidates import Candidate, choose
from compressor.types import Artifact, Parity, Precision


def candidate(precision: Precision, ms: float, agreement: float = 1.0) -> Candidate:
    """Times within a per cent of `ms`."""
    artifact = Artifact("null", Path(precision), "", 1, precision, (), ())
    times = tuple(int(1e6 * ms * f) for f in np.random.default_rng(0).uniform(0.99, 1.01, 60))
    return Candidate(precision, artifact, Parity(0.0, 1.0, agreement, 100), times, np.zeros((8, 2)))


@pytest.mark.parametrize("precision", ["w8a32", "w4a32"])
@pytest.mark.parametrize(("ms", "ratio"), [(14.0, "1.40x"), (5.0, "0.50x")])
def test_weights_alone_are_kept_for_their_size_with_their_ratio(precision, ms, ratio):
    both = candidate("fp32", 10.0), candidate(precision, ms, agreement=0.9)
    kept, reverted, reason = choose(both, precision, 98.0)
    assert kept is both[1] and not reverted
    assert reason.startswith(f"{precision} kept, for its size: fp32 10 ms; {precision} ") and ratio in reason


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_other_integers_revert_when_they_are_slower(precision):
    """The control."""
    both = candidate("fp32", 10.0), candidate(precision, 14.0)
    kept, reverted, reason = choose(both, precision, 98.0)
    assert kept is both[0] and reverted
    assert reason.startswith("fp32 kept: ") and "1.40x" in reason


def test_the_fastest_that_agrees_is_kept():
    three = candidate("fp32", 10.0), candidate("bf16", 8.0), candidate("w8a8", 6.0, agreement=0.9)
    assert choose(three, "auto", 98.0)[:2] == (three[1], True)
    assert choose(three, "auto", 85.0)[:2] == (three[2], False)
    assert choose(three[:1], "fp32", 98.0)[:2] == (three[0], False)
