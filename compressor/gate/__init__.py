"""Has the candidate become slower? Pure functions of ratios; processes and turns are `compressor.duel`'s.

**What is measured.** One *pair* is two fresh processes, candidate and baseline, that infer in turns; its value is the
median over turns of log(candidate time / baseline time), time spent waiting for a CPU subtracted where Linux tells it.
Everything inside a pair collapses to that one number because processes differ by luck (page placement, address layout)
for as long as they live: inferences of one process are not independent evidence, pairs are.

**Noise model.** y_i = log(ratio) + n_i. Who starts first and who infers first is drawn by coin for every pair. If both
artifacts are the same, swapping the names therefore gives an equally likely experiment, so n_i is symmetric about zero
*given all earlier pairs*, by the design and not by assumption. Nothing else is assumed: noise may be heavy-tailed, may
grow when a neighbour wakes up, may depend on the past. For unequal artifacts the assumption is that noise multiplies
both alike.

**The test.** For x symmetric about 0 and any fixed b, E[1 + c tanh(b x)] = 1, since tanh is odd. So for a hypothesis
"ratio <= exp(t)"

    E_n(t) = mean over b of  prod_i (1 + c tanh(b (y_i - t)))

is a non-negative supermartingale starting at 1, and by Ville's inequality P(E_n(t) ever reaches 1/a) <= a: one may look
after every pair and stop when the answer is clear. Each factor lies in (1 - c, 1 + c) = (0.2, 1.8): an outlier can
neither decide nor undo more than three pairs, and eight clean pairs suffice. b is a scale (small: averages, for noise
larger than the effect; large: counts signs); the mean over four values costs at most log 4 of evidence and needs no
tuning. Where E_n(t) < 1/a is a confidence sequence for the ratio.

**Decision** at limit L = 1 + max_regression and a = 1 - confidence:
    pass   when E for "ratio >= L" reaches 1/a (all pairs);
    fail   when E for "ratio <= L" reaches 1/sqrt(a), and then again in a second, independent run: P <= sqrt(a)^2 = a;
    inconclusive   when the pairs allowed run out first.
Both errors, failing when the ratio is within the limit and passing when it is beyond, are at most a.

Source: J. Ville 1939, Etude critique de la notion de collectif; A. Ramdas, J. Ruf, M. Larsson, W. Koolen 2020,
arXiv:2009.03167 (tests of symmetry are products of 1 + odd function); S. Howard, A. Ramdas, J. McAuliffe, J. Sekhon
2021, arXiv:1810.08240 (confidence sequences). Ours: c tanh as the odd function (bounded, monotone, so that bounds are
found by bisection), the grid of b, and the split of a over two runs.

Not covered: a bias that coins cannot move, such as one artifact lying on a slower disk and being paged in while timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from compressor.errors import ConfigError
from compressor.intervals import quantile_interval
from compressor.types import Array, Profile, Verdict

__all__ = ["GateConfig", "GateVerdict", "bounds", "conclude", "conclude_stored", "log_evidence", "next_step"]

STAKE = 0.8  # c
SCALES = np.array([10.0, 30.0, 100.0, 300.0])  # b, per unit of log ratio: noise of about 10 %, 3 %, 1 %, 0.3 %
FEWEST_FOR_NOISE = 5  # pairs from which the noise is estimated
RESAMPLES = 100
POWER = 0.8
LARGEST_EFFECT = 2.0  # log ratio; noise that hides this hides everything
TOO_CLOSE = "too noisy or too close to the limit."
Runs = Sequence[Sequence[float]]


@dataclass(frozen=True)
class GateConfig:
    """What is allowed, and how sure to be.

    Attributes:
        max_regression: slow-down that is still allowed, 0.05 = 5 %.
        confidence: 1 - the probability of each wrong decision.
        max_pairs: most process pairs, of the first run and of the confirmation each.
        seed: of the coins and of the resampling behind the minimum detectable effect; ``vitrim gate`` draws a new one
            for every run.
    """

    max_regression: float = 0.05
    confidence: float = 0.99
    max_pairs: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not -1 < self.max_regression < math.inf:
            raise ConfigError(f"max_regression must be finite and above -1, got {self.max_regression}.")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence must be in [0.5, 1), got {self.confidence}.")
        # Below, even perfect agreement decides nothing
        fewest = math.ceil(math.log(1 / (1 - self.confidence)) / math.log(1 + STAKE))
        if self.max_pairs < fewest:
            raise ConfigError(f"max_pairs must be at least {fewest} at this confidence, got {self.max_pairs}.")

    @property
    def limit(self) -> float:
        """Largest allowed ratio."""
        return 1.0 + self.max_regression


@dataclass(frozen=True)
class GateVerdict(Verdict):
    """Verdict on latency. Bounds that the pairs cannot give are 0 and infinity.

    Attributes:
        ratio: candidate time / baseline time.
        ratio_ci: lower and upper bound, each holding with the confidence asked for.
        limit: largest allowed ratio.
        min_detectable: smallest true ratio found 4 times out of 5 with this noise and the pairs allowed, or with the
            pairs measured where the time ended first; infinity where those find none.
        pairs: process pairs measured, confirmation included.
        confirmed: whether a second, independent run failed too.
    """

    ratio: float
    ratio_ci: tuple[float, float]
    limit: float
    min_detectable: float
    pairs: int
    confirmed: bool = False


def next_step(runs: Runs, config: GateConfig) -> Literal["measure", "confirm", "pass", "fail", "inconclusive"]:
    """What to do after the pairs in `runs`: measure another pair in the last run, begin a second run, or stop with a verdict.

    Args:
        runs: candidate / baseline ratio of every pair; one list, or two once a confirmation has begun.
        config: limit, confidence and pairs allowed.
    """
    decided = _decision(runs, config)
    if decided != "inconclusive":
        return decided
    if len(runs) == 1 and _slower(runs[0], config):
        return "confirm"
    return "measure" if len(runs[-1]) < config.max_pairs else "inconclusive"


def conclude(runs: Runs, config: GateConfig) -> GateVerdict:
    """The verdict on the pairs in `runs`; inconclusive where more pairs would be needed, saying so where the time for
    them ended before the gate was done.

    Args:
        runs: as for `next_step`.
        config: as for `next_step`.

    Raises:
        ConfigError: no pair, or a ratio that is not positive and finite.
    """
    y = _logs([value for run in runs for value in run])
    if len(y) == 0:
        raise ConfigError("conclude: runs must hold at least one pair, got none.")
    verdict, ratio, ci = _decision(runs, config), math.exp(float(np.median(y))), bounds(runs, config.confidence)
    cut = next_step(runs, config) in ("measure", "confirm")
    able = _min_detectable(y, config, len(y) if cut else 2 * config.max_pairs)
    found = GateVerdict(verdict, "", ratio, ci, config.limit, able, len(y), len(runs) == 2 and verdict == "fail")
    return GateVerdict(**{**vars(found), "sentence": _sentence(found, config, _doubt(runs, config, able, cut=cut))})


def log_evidence(ratios: Sequence[float], limit: float) -> float:
    """log E_n against "the true ratio is at most `limit`"; reaching log(1/a) refutes it at error a.

    >>> round(log_evidence([1.08] * 8, 1.0), 2), log_evidence([], 1.0)
    (4.48, 0.0)
    """
    return float(_running(_logs(ratios) - math.log(limit))[-1]) if len(ratios) else 0.0


def bounds(runs: Runs, confidence: float) -> tuple[float, float]:
    """Lower and upper bound of the true ratio, each holding with `confidence` whenever measuring stopped.

    The runs' evidence is multiplied (their logarithms added). A bound the pairs cannot give is 0 or infinity.
    """
    need, logs = math.log(1 / (1 - confidence)), [_logs(run) for run in runs if len(run)]

    def evidence(sign: float, theta: float) -> float:
        return sum(float(_running(sign * (y - theta))[-1]) for y in logs)

    edge = (
        max((float(np.abs(y).max()) for y in logs), default=0.0) + 2.0
    )  # tanh is 1 to six digits beyond this distance
    low = _last_true(lambda theta: evidence(1.0, theta) >= need, -edge, edge)
    high = _last_true(lambda theta: evidence(-1.0, -theta) >= need, -edge, edge)
    return (0.0 if low is None else math.exp(low)), (math.inf if high is None else math.exp(-high))


def conclude_stored(baseline: Profile, candidate: Profile, config: GateConfig) -> GateVerdict:
    """The weaker verdict against a profile measured earlier: nothing was paired, so drift counts as doubt.

    The interval is that of the two medians (order statistics), widened both ways by how much the yardstick, a fixed
    piece of work timed with every profile, differs between then and now.
    """
    share = 1 - (1 - config.confidence) / 2  # two intervals have to hold at once
    (b_low, b_high), (c_low, c_high) = (quantile_interval(p.samples_ns, 0.5, share) for p in (baseline, candidate))
    ratio = float(np.median(candidate.samples_ns) / np.median(baseline.samples_ns))
    if not baseline.yardstick_ns or not candidate.yardstick_ns:
        drift = math.inf
    else:
        drift = abs(math.log(float(np.median(candidate.yardstick_ns) / np.median(baseline.yardstick_ns))))
    slack = math.exp(drift)
    low = max(0.0, c_low / b_high / slack) if math.isfinite(slack) else 0.0
    high = c_high / b_low * slack if b_low > 0 else math.inf  # the samples are too few for a bound
    if low > config.limit:
        verdict: Literal["pass", "fail", "inconclusive"] = "fail"
    else:
        verdict = "pass" if high <= config.limit else "inconclusive"
    detectable = config.limit * high / ratio * slack
    told = (
        f"the machine itself has drifted by {100 * (slack - 1):.1f} % since"
        if math.isfinite(drift)
        else "it has no yardstick"
    )
    found = GateVerdict(verdict, "", ratio, (low, high), config.limit, detectable, 0)
    extra = f" Against a stored profile, unpaired ({told}); give the baseline bundle for a side-by-side test."
    return GateVerdict(**{**vars(found), "sentence": _sentence(found, config, TOO_CLOSE + _able(detectable)) + extra})


# --------------------------------------------------------------------------- inside


def _decision(runs: Runs, config: GateConfig) -> Literal["pass", "fail", "inconclusive"]:
    need = math.log(1 / (1 - config.confidence))
    if sum(log_evidence([1 / value for value in run], 1 / config.limit) for run in runs) >= need:
        return "pass"
    return "fail" if len(runs) == 2 and all(_slower(run, config) for run in runs) else "inconclusive"


def _slower(run: Sequence[float], config: GateConfig) -> bool:
    """Whether one run by itself refutes "within the limit", at error sqrt(a)."""
    return log_evidence(run, config.limit) >= math.log(1 / (1 - config.confidence)) / 2


def _running(x: Array) -> Array:
    """log E after each value: (..., n) -> (..., n)."""
    total = np.cumsum(np.log1p(STAKE * np.tanh(x[..., None] * SCALES)), axis=-2)
    top = total.max(axis=-1)
    result: Array = top + np.log(np.exp(total - top[..., None]).mean(axis=-1))
    return result


def _logs(ratios: Sequence[float]) -> Array:
    values = np.asarray(ratios, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ConfigError("gate: ratios must be positive and finite, got zero, less, NaN or infinity.")
    return np.log(values)


def _last_true(holds: Callable[[float], bool], low: float, high: float) -> float | None:
    """Largest theta in [low, high] for which `holds` (true below, false above); None when it never does."""
    if not holds(low):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _min_detectable(y: Array, config: GateConfig, pairs: int) -> float:
    """Smallest true ratio found with probability `POWER` in both runs, of `pairs` pairs together.

    Noise is resampled from the residuals of the pairs.
    """
    if len(y) < FEWEST_FOR_NOISE:
        return math.inf
    residuals, rng = y - np.median(y), np.random.default_rng(config.seed)
    noise = rng.choice(residuals, size=(RESAMPLES, 2, min(pairs, config.max_pairs)))
    need = math.log(1 / (1 - config.confidence)) / 2

    def missed(effect: float) -> bool:
        seen = _running(noise + effect) >= need
        took = np.where(seen.any(axis=-1), seen.argmax(axis=-1) + 1, pairs + 1)  # pairs until a run has seen it
        return float((took.sum(axis=-1) <= pairs).mean()) < POWER

    if missed(LARGEST_EFFECT):
        return math.inf
    found = _last_true(missed, 0.0, LARGEST_EFFECT)
    return config.limit * math.exp(found if found is not None else 0.0)


def _doubt(runs: Runs, config: GateConfig, able: float, *, cut: bool) -> str:
    """Why the pairs in `runs` decide nothing, where they do not; `cut`: more of them were allowed."""
    if not cut:
        unconfirmed = "a first run saw a slow-down that the second did not confirm."
        return (unconfirmed if len(runs) == 2 else TOO_CLOSE) + _able(able)
    seen = len(runs) == 2 or _slower(runs[0], config)
    why = "a first run saw a slow-down; the time ended before a second could confirm it"
    return f"{why if seen else 'the time ended before the pairs could decide'}. Allow more with --budget."


def _able(ratio: float) -> str:
    """What the test could have seen, nothing where that is not known."""
    return f" A slow-down of {100 * (ratio - 1):.1f} % or more would have been found." if math.isfinite(ratio) else ""


def _sentence(found: GateVerdict, config: GateConfig, doubt: str) -> str:
    low, high = (f"{value:.3f}" if math.isfinite(value) and value > 0 else "unknown" for value in found.ratio_ci)
    took = f"{found.ratio:.3f}x the baseline's time ({100 * config.confidence:g} % bounds {low} to {high})"
    if found.verdict == "fail":
        text = f"Slower: the candidate takes {took}, beyond the limit of {found.limit:.3f}x"
        return f"{text}, confirmed by a second run." if found.confirmed else f"{text}."
    if found.verdict == "pass":
        return f"Within the limit: the candidate takes {took}; the limit is {found.limit:.3f}x."
    return f"Inconclusive: the candidate takes {took}, the limit is {found.limit:.3f}x; {doubt}"
