"""The latency test: its error is what it says under noise that no model describes, and it finds what it should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ConfigError
from compressor.gate import GateConfig, bounds, conclude, conclude_stored, log_evidence, next_step
from compressor.types import Profile

Rng = np.random.Generator


def decide(ratios: list[list[float]], config: GateConfig) -> str:
    """What the gate says when it may measure the given ratios, in the order it asks for them."""
    runs: list[list[float]] = [[]]
    while (step := next_step(runs, config)) in ("measure", "confirm"):
        if step == "confirm":
            runs.append([])
        runs[-1].append(ratios[len(runs) - 1][len(runs[-1])])
    return step


def normal(rng: Rng, n: int) -> np.ndarray:
    return 0.01 * rng.normal(size=n)


def cauchy(rng: Rng, n: int) -> np.ndarray:
    return np.clip(0.01 * rng.standard_cauchy(n), -5, 5)  # no mean, no variance


def bursts(rng: Rng, n: int) -> np.ndarray:
    """Calm, then a neighbour wakes up: the scale changes by twenty and depends on what came before."""
    noise, scale = np.empty(n), 0.002
    for i in range(n):
        noise[i] = scale * rng.normal()
        scale = 0.04 if abs(noise[i]) > 1.5 * scale else 0.002
    return noise


def lattice(rng: Rng, n: int) -> np.ndarray:
    return rng.choice([-0.02, 0.0, 0.02], size=n)  # ties and exact zeros


NOISES = [normal, cauchy, bursts, lattice]


@pytest.mark.parametrize("noise", NOISES)
def test_wrong_decisions_at_the_limit_are_at_most_as_frequent_as_asked(noise: object) -> None:
    """The true ratio is exactly the limit, where both errors are largest; the gate may look after every pair."""
    config, rng, trials = GateConfig(max_regression=0.03, confidence=0.9), np.random.default_rng(5), 400
    said = []
    for _ in range(trials):
        ratios = [list(config.limit * np.exp(noise(rng, config.max_pairs))) for _ in range(2)]  # type: ignore[operator]
        said.append(decide(ratios, config))
    # Each error may happen in 10 % of 400; 58 is three standard deviations (6) above 40
    assert said.count("fail") <= 58
    assert said.count("pass") <= 58


def test_the_simulation_can_see_a_test_that_is_wrong() -> None:
    """Negative control: looking after every pair at a t statistic of 1.28 (10 %) is wrong far more often than 10 %."""
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(200):
        x = normal(rng, 40)
        t = [x[:n].mean() / (x[:n].std(ddof=1) / math.sqrt(n)) for n in range(3, 41)]
        wrong += max(t) > 1.2816
    assert wrong > 60


@pytest.mark.parametrize("noise", NOISES)
def test_a_slow_down_is_found_and_no_change_passes(noise: object) -> None:
    config, rng, trials = GateConfig(max_regression=0.02), np.random.default_rng(6), 60
    found = {"slower": 0, "same": 0}
    for _ in range(trials):
        same, slower = (
            [list(ratio * np.exp(noise(rng, config.max_pairs))) for _ in range(2)]  # type: ignore[operator]
            for ratio in (1.0, 1.05)
        )
        found["slower"] += decide(slower, config) == "fail"
        found["same"] += decide(same, config) == "pass"
    # Noise of 1 % (Cauchy and bursts: much more at times) against differences of 2 % and 3 % in up to 40 pairs
    assert found["slower"] >= 0.9 * trials
    assert found["same"] >= 0.9 * trials


def test_the_smallest_number_of_pairs_that_can_decide_does_decide() -> None:
    """With no noise at all, eight pairs pass at 99 % (1.8^8 > 100 > 1.8^7), and four plus four fail (1.8^4 > 10)."""
    need = 8
    config = GateConfig(max_pairs=need)
    assert next_step([[0.5] * 7], config) == "measure"
    assert next_step([[0.5] * 8], config) == "pass"
    assert next_step([[2.0] * 3], config) == "measure"
    assert next_step([[2.0] * 4], config) == "confirm"
    assert conclude([[2.0] * 8], config).verdict == "inconclusive"  # one run alone never fails
    assert conclude([[2.0] * 4, [2.0] * 4], config).verdict == "fail"
    assert conclude([[2.0] * 4, [2.0] * 3], config).verdict == "inconclusive"
    with pytest.raises(ConfigError, match=f"max_pairs must be at least {need} at this confidence, got {need - 1}"):
        GateConfig(max_pairs=need - 1)


def test_a_failure_needs_a_second_run_that_fails_too() -> None:
    config = GateConfig(max_regression=0.05)
    slow, fine = [1.12] * 8, [1.0] * 12
    assert next_step([slow], config) == "confirm"
    assert conclude([slow, slow], config).confirmed
    found = conclude([slow, fine], config)
    assert found.verdict != "fail"
    assert not found.confirmed


def test_one_outlier_never_decides() -> None:
    config = GateConfig()
    assert log_evidence([1e6], 1.05) <= math.log(1.8)  # a single pair is worth less than one coin flip
    assert log_evidence([1.2] * 10 + [1e-6], 1.05) >= log_evidence([1.2] * 7, 1.05)  # and undoes at most three
    assert next_step([[1.0] * 13 + [1e6]], config) == "pass"


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=20), st.floats(0.8, 1.25))
@settings(max_examples=60, deadline=None)
def test_bounds_are_where_the_evidence_crosses(ratios: list[float], factor: float) -> None:
    low, high = bounds([ratios], 0.99)
    need = math.log(100)
    assert low <= high
    if low > 0:
        assert log_evidence(ratios, low * 0.9999) >= need - 1e-9
        assert log_evidence(ratios, low * 1.0001) <= need + 1e-9
    # Measuring everything `factor` times slower moves the bounds by that factor, no more
    moved = bounds([[factor * r for r in ratios]], 0.99)
    assert moved == pytest.approx((low * factor, high * factor), rel=1e-6)


def test_bounds_cover_the_truth_as_often_as_they_say() -> None:
    rng, outside = np.random.default_rng(8), 0
    for _ in range(300):
        ratios = (1.07 * np.exp(bursts(rng, 30))).tolist()
        low, high = bounds([ratios], 0.95)
        outside += not low <= 1.07 <= high
    assert outside <= 45  # Each bound fails in at most 5 %: 30 of 300 expected at most, plus three deviations


def test_a_failure_means_that_the_lower_bound_is_beyond_the_limit() -> None:
    config, rng = GateConfig(max_regression=0.01), np.random.default_rng(9)
    for _ in range(12):
        runs = [(1.03 * np.exp(normal(rng, n))).tolist() for n in rng.integers(5, 20, size=2)]
        found = conclude(runs, config)
        if found.verdict == "fail":
            assert found.ratio_ci[0] >= config.limit - 1e-9
        if found.verdict == "pass":
            assert found.ratio_ci[1] <= config.limit + 1e-9


def test_bounds_of_too_few_pairs_are_unknown() -> None:
    assert bounds([[1.0] * 5], 0.99) == (0.0, math.inf)
    assert conclude([[1.0] * 4], GateConfig()).min_detectable == math.inf


def test_min_detectable_is_found_four_times_out_of_five() -> None:
    """The promise is put to the test: a slow-down of that size, with noise of the same kind."""
    config, rng = GateConfig(max_regression=0.02), np.random.default_rng(10)
    hits = dict.fromkeys(("promised", "third"), 0)
    for _ in range(8):
        noisy = conclude([np.exp(0.02 * rng.normal(size=40)).tolist()], config)
        assert config.limit < noisy.min_detectable < 1.10
        third = config.limit * (noisy.min_detectable / config.limit) ** 0.33
        for _ in range(25):
            for size, ratio in (("promised", noisy.min_detectable), ("third", third)):
                runs = [list(ratio * np.exp(0.02 * rng.normal(size=40))) for _ in range(2)]
                hits[size] += decide(runs, config) == "fail"
    # 160 of 200 expected; the noise is itself estimated from 40 pairs each time, which is good to 11 %
    assert 130 <= hits["promised"] <= 190
    assert hits["third"] < 100  # Negative control: a third of the way from the limit, most are missed
    calm = conclude([np.exp(0.002 * rng.normal(size=40)).tolist()], config)
    assert calm.min_detectable < noisy.min_detectable


def test_the_sentence_says_ratio_bounds_limit_and_what_could_be_seen() -> None:
    config = GateConfig(max_regression=0.05)
    slower = conclude([[1.12] * 8, [1.12] * 8], config).sentence
    assert slower.startswith("Slower: the candidate takes 1.120x the baseline's time (99 % bounds 1.")
    assert slower.endswith("beyond the limit of 1.050x, confirmed by a second run.")
    assert conclude([[1.0] * 9], config).sentence.endswith("; the limit is 1.050x.")
    unsure = conclude([[1.04, 1.06] * 20], config).sentence
    assert unsure.startswith("Inconclusive: ")
    assert "would have been found" in unsure


@pytest.mark.parametrize("runs", [[[1.5] * 6], [[1.5] * 6, [1.5] * 2]])
def test_a_slow_down_whose_confirmation_the_time_cut_off_is_said_so(runs: list[list[float]]) -> None:
    cut = conclude(runs, GateConfig()).sentence
    assert cut.startswith("Inconclusive: the candidate takes 1.500x")
    assert "a first run saw a slow-down; the time ended before a second could confirm it. Allow more with" in cut
    assert not any(untrue in cut for untrue in ("would have been found", "too noisy", "did not confirm"))


def test_only_all_pairs_allowed_are_called_too_noisy_or_unconfirmed() -> None:
    config = GateConfig(max_pairs=8)
    assert "the time ended before the pairs could decide" in conclude([[1.04, 1.06] * 3], config).sentence
    assert "too noisy or too close to the limit. A slow-down" in conclude([[1.04, 1.06] * 4], config).sentence
    unconfirmed = conclude([[1.12] * 4, [1.04, 1.06] * 4], config).sentence
    assert "a first run saw a slow-down that the second did not confirm. A slow-down of" in unconfirmed


def test_min_detectable_is_of_the_pairs_that_were_measured() -> None:
    """Noise of 2 %; four pairs in each of two runs are the fewest that can fail anything at 99 %."""
    noise = np.exp(0.02 * np.random.default_rng(3).normal(size=40)).tolist()
    runs = {n: [[1.05 * ratio for ratio in noise[:n]]] for n in (7, 20, 40)}
    able = {n: conclude(run, GateConfig()).min_detectable for n, run in runs.items()}
    assert able[7] == math.inf
    assert 1.05 < able[40] < able[20] < 1.4


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_ratios_that_are_not_times_are_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratios must be positive and finite"):
        conclude([[1.0, ratio]], GateConfig())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_regression": -1.0}, "max_regression must be finite and above -1, got -1.0"),
        ({"max_regression": math.nan}, "max_regression must be finite and above -1, got nan"),
        ({"max_regression": math.inf}, "max_regression must be finite and above -1, got inf"),
        ({"confidence": 1.0}, r"confidence must be in \[0.5, 1\), got 1.0"),
    ],
)
def test_config_refuses_what_cannot_work(change: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GateConfig(**change)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- against a stored profile


def stored(factor: float, yardstick: float = 1.0, seed: int = 0, n: int = 100) -> Profile:
    rng = np.random.default_rng(seed)
    samples = tuple((5e6 * factor * rng.lognormal(sigma=0.01, size=n)).astype(int).tolist())
    return Profile("ort", samples, 5, 1, 1, 0.0, 0.0, 0, {"id": "x"}, yardstick_ns=(int(20000 * yardstick),) * 9)


@pytest.mark.parametrize(
    ("factor", "yardstick", "verdict"),
    [
        (1.0, 1.0, "pass"),
        (1.2, 1.0, "fail"),
        (1.05, 1.0, "inconclusive"),
        (1.2, 1.2, "inconclusive"),  # the machine itself is 20 % slower than then: nothing can be said
        (1.0, 0.9, "inconclusive"),
    ],
)
def test_stored_profile_gives_a_verdict_only_as_far_as_the_yardstick_held(
    factor: float, yardstick: float, verdict: str
) -> None:
    found = conclude_stored(stored(1.0), stored(factor, yardstick, seed=1), GateConfig())
    assert found.verdict == verdict
    assert "stored profile, unpaired" in found.sentence
    assert not found.confirmed


def test_stored_profile_without_a_yardstick_is_never_trusted() -> None:
    bare = Profile("ort", stored(1.0).samples_ns, 5, 1, 1, 0.0, 0.0, 0, {})
    found = conclude_stored(bare, stored(3.0), GateConfig())
    assert found.verdict == "inconclusive"
    assert "it has no yardstick" in found.sentence


def test_stored_profile_of_too_few_samples_gives_no_bound_and_claims_none() -> None:
    """Ten samples hold no 99.9 % interval of their median; a hundred do."""
    config = GateConfig(confidence=0.999)
    few = conclude_stored(stored(1.0, n=10), stored(0.9, seed=1), config)
    assert few.verdict == "inconclusive"
    assert few.ratio_ci[1] == few.min_detectable == math.inf
    assert "to unknown)" in few.sentence and "would have been found" not in few.sentence
    assert conclude_stored(stored(1.0), stored(0.9, seed=1), config).verdict == "pass"
