"""Distribution-free intervals: order statistics and proportions. Pure functions of numbers, no scipy.

Sources: H. A. David, H. N. Nagaraja (2003), *Order Statistics*, 3rd ed., section 7.1 (intervals for quantiles);
E. B. Wilson (1927), J. Am. Stat. Assoc. 22, 209-212 (score interval for a proportion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from compressor.errors import ConfigError

__all__ = ["Ratio", "paired_ratio", "proportion_interval", "quantile_interval"]


@dataclass(frozen=True)
class Ratio:
    """Candidate over reference with its interval; below 1 is faster. An interval that cannot be given is infinite."""

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def is_faster(self) -> bool:
        """Whether the whole interval lies below 1."""
        return self.high < 1.0


def quantile_interval(samples: Sequence[float], q: float, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the `q` quantile that holds with at least `confidence`, whatever the distribution.

    The number of samples below the true quantile is Binomial(n, q). So (x_(r), x_(s)) covers it with probability
    P(r <= K <= s - 1); r is the largest rank with P(K < r) <= (1 - confidence) / 2 and s the smallest with P(K >= s) <=
    the same. A bound for which there is no such rank is infinite rather than invented: p99 has an upper bound from 368
    samples on.

    Args:
        samples: independent measurements, any order.
        q: 0 < q < 1.
        confidence: 0 < confidence < 1.

    Raises:
        ConfigError: no samples, or `q` or `confidence` outside (0, 1).

    >>> quantile_interval(range(1, 101), 0.5), quantile_interval([5.0] * 20, 0.99)
    ((40.0, 61.0), (5.0, inf))
    """
    if not (0 < q < 1 and 0 < confidence < 1):
        raise ConfigError(f"quantile_interval: q and confidence must be in (0, 1), got {q} and {confidence}.")
    if len(samples) == 0:
        raise ConfigError("quantile_interval: samples must hold at least one measurement, got none.")
    ordered, tail = np.sort(np.asarray(samples, dtype=np.float64)), (1 - confidence) / 2
    below = np.cumsum(_binomial(len(ordered), q))  # below[k] = P(K <= k)
    ranks_low = int(np.searchsorted(below, tail, side="right"))  # largest r with P(K <= r - 1) <= tail
    low = float(ordered[ranks_low - 1]) if ranks_low >= 1 else -math.inf
    rank_high = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # smallest s with P(K <= s - 1) >= 1 - tail
    high = float(ordered[rank_high - 1]) if rank_high <= len(ordered) else math.inf
    return low, high


def paired_ratio(candidate: Sequence[float], reference: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Median of candidate / reference over pairs taken next to each other in time, with its exact sign-test interval.

    Pairing cancels whatever slows both (frequency, other tenants); the order-statistic interval of the median ratio
    needs no assumption on the noise but that pairs are independent. Below six pairs its bounds are infinite.

    Raises:
        ConfigError: lengths differ, or are zero, or a time is not positive.
    """
    if len(candidate) != len(reference) or len(candidate) == 0:
        raise ConfigError(
            f"paired_ratio: samples must be equal in number and not none, got {len(candidate)}, {len(reference)}."
        )
    top, bottom = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if not ((top > 0).all() and (bottom > 0).all()):
        raise ConfigError("paired_ratio: samples must be positive times, got zero or less.")
    ratios = top / bottom
    low, high = quantile_interval(ratios.tolist(), 0.5, confidence)
    return Ratio(float(np.median(ratios)), max(low, 0.0), high, len(ratios))


def proportion_interval(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    >>> [round(bound, 4) for bound in proportion_interval(1837, 2000)]
    [0.9057, 0.9297]

    Raises:
        ConfigError: `count` is not positive or `successes` not within it.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ConfigError(f"proportion_interval: successes must be within 0..count, got {successes} of {count}.")
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), successes / count
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _binomial(n: int, q: float) -> NDArray[np.float64]:
    """P(K = k) for k = 0..n, K ~ Binomial(n, q); (n + 1,) float64, by logarithms so that no term overflows."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])  # log k!
    k = np.arange(n + 1)
    terms: NDArray[np.float64] = np.exp(logs[n] - logs[k] - logs[n - k] + k * math.log(q) + (n - k) * math.log1p(-q))
    return terms
