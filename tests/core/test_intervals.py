"""Intervals against scipy's distributions and against their own promise: coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compressor.errors import ConfigError
from compressor.intervals import paired_ratio, proportion_interval, quantile_interval


def _reference(n: int, q: float, confidence: float) -> tuple[float, float]:
    """Ranks by trying every one, with scipy's binomial; samples are 1..n, so a rank is its value."""
    tail = (1 - confidence) / 2
    below = [r for r in range(1, n + 1) if stats.binom.cdf(r - 1, n, q) <= tail]
    above = [s for s in range(1, n + 1) if stats.binom.sf(s - 1, n, q) <= tail]
    return (float(max(below)) if below else -math.inf), (float(min(above)) if above else math.inf)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [1, 5, 6, 37, 200, 367, 368])
def test_quantile_interval_is_the_order_statistics_scipy_gives(n: int, q: float) -> None:
    assert quantile_interval(range(1, n + 1), q) == _reference(n, q, 0.95)


def test_quantile_interval_of_too_few_samples_is_infinite() -> None:
    assert quantile_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == (-math.inf, math.inf)
    # Positive control at the smallest n that can: 2 / 2^6 < 0.05
    assert quantile_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.5) == (1.0, 6.0)
    assert quantile_interval(range(367), 0.99)[1] == math.inf
    assert quantile_interval(range(368), 0.99)[1] == 367.0


def test_quantile_interval_covers_as_often_as_it_says_on_a_skewed_distribution() -> None:
    rng = np.random.default_rng(0)
    true = math.exp(1.2815515655446004)  # p90 of a log-normal
    hits = dict.fromkeys((0.95, 0.5), 0)
    for _ in range(600):
        samples = rng.lognormal(size=80).tolist()
        for level in hits:
            low, high = quantile_interval(samples, 0.9, level)
            hits[level] += low <= true <= high
    assert hits[0.95] >= 560  # Expected at least 570; four standard deviations (5.3) below
    assert hits[0.5] < 480  # Negative control: a 50 % interval is not a 95 % one


@given(st.integers(0, 200), st.integers(1, 200))
def test_proportion_interval_is_scipys_wilson(successes: int, extra: int) -> None:
    count = successes + extra
    expected = stats.binomtest(successes, count).proportion_ci(method="wilson")
    # Both evaluate the same closed form in float64
    assert proportion_interval(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_paired_ratio_cancels_what_slows_both() -> None:
    rng = np.random.default_rng(1)
    machine = rng.lognormal(sigma=0.5, size=100)  # the same for both sides of a pair
    reference = machine * rng.lognormal(sigma=0.01, size=100)
    candidate = 0.97 * machine * rng.lognormal(sigma=0.01, size=100)
    found = paired_ratio(candidate, reference)
    assert found.is_faster
    assert found.low <= 0.97 <= found.high
    shuffled = paired_ratio(
        rng.permutation(candidate), reference
    )  # Negative control: without the pairing nothing is seen
    assert not shuffled.is_faster


def test_paired_ratio_needs_six_pairs_to_say_anything() -> None:
    assert not paired_ratio([1.0] * 5, [2.0] * 5).is_faster
    assert paired_ratio([1.0] * 6, [2.0] * 6).is_faster


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quantile_interval([], 0.5), "samples must hold at least one measurement, got none"),
        (lambda: quantile_interval([1.0], 1.0), r"q and confidence must be in \(0, 1\), got 1.0 and 0.95"),
        (lambda: paired_ratio([1.0], [1.0, 2.0]), "equal in number and not none, got 1, 2"),
        (lambda: paired_ratio([1.0], [0.0]), "positive times, got zero or less"),
        (lambda: proportion_interval(3, 2), "within 0..count, got 3 of 2"),
    ],
)
def test_refusals_say_the_rule_and_the_value(call: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()  # type: ignore[operator]
