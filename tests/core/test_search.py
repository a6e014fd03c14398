"""Which size is picked from measured points, and how values are typed."""

import gc

import numpy as np
import pytest

from compressor import checkpoint
from compressor.cache import Cache
from compressor.device import fingerprint
from compressor.errors import BudgetError, ConfigError
from compressor.options import milliseconds, number_or_auto, shares
from compressor.pipeline import Run, Tools
from compressor.race import Raced
from compressor.recipe import Recipe
from compressor.search import Budget, Point, front, pick, search
from tests.targets.networks import PLAIN, model


def point(size: float, ms: float, agreement: float) -> Point:
    return Point(size, "w8a8", 100, 100, ms, 10 / ms, agreement, (0, 100), 100)


POINTS = (point(1.0, 8.0, 100.0), point(0.8, 9.0, 99.8), point(0.6, 5.0, 99.5), point(0.4, 4.0, 97.0))


def test_the_front_drops_what_another_beats_in_both():
    assert [p.target_macs for p in front(POINTS)] == [0.4, 0.6, 1.0]


def test_without_a_latency_limit_the_fastest_close_enough_is_picked():
    assert pick(POINTS, Budget(max_drop=1.0)).target_macs == 0.6
    assert pick(POINTS, Budget(max_drop=5.0)).target_macs == 0.4


def test_with_a_latency_limit_the_one_that_agrees_most_is_picked():
    assert pick(POINTS, Budget(max_latency=8.5, max_drop=5.0)).target_macs == 1.0
    assert pick(POINTS, Budget(max_latency=5.0, max_drop=5.0)).target_macs == 0.6


def test_nothing_inside_the_budget_is_an_error_with_the_nearest():
    with pytest.raises(BudgetError, match=r"4 ms and 3 % at best, with 40%"):
        pick(POINTS, Budget(max_latency=3.0, max_drop=5.0))
    with pytest.raises(BudgetError, match=r"2 % at best, with 100%"):
        pick((point(1.0, 8.0, 98.0),), Budget(max_drop=0.5))
    assert BudgetError("").exit_code == 1


@pytest.mark.parametrize(
    "bad", [{"sizes": ()}, {"sizes": (0.0,)}, {"sizes": (1.5,)}, {"max_latency": 0}, {"max_drop": -1}]
)
def test_budgets_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        Budget(**bad)


@pytest.mark.parametrize("recipe", [Recipe(targets=("ort", "openvino")), Recipe(mlp_ratio=0.5), Recipe(pruner="corp")])
def test_what_search_chooses_itself_must_not_be_given(recipe, tmp_path):
    with pytest.raises(ConfigError, match="one target"):
        search(recipe, Budget(), tmp_path, None)  # type: ignore[arg-type]  # refused before any tool is used


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Of a tiny network and noise."""
    folder = tmp_path_factory.mktemp("m")
    checkpoint.save(model(PLAIN), folder)
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (40, *PLAIN.image_size, PLAIN.in_chans), np.uint8))
    return Recipe(str(folder), str(folder / "images.npz"), calib_size=40, min_agreement=0)


class Scripted:
    """A race whose times are written down: the float model's, and of each race the integers'."""

    def __init__(self, *integers_ms: float) -> None:
        self.left, self.runs_kept = list(integers_ms), 0

    def __call__(self, artifacts, sessions, inputs, config) -> Raced:
        del sessions, inputs, config  # Unused
        gc.collect()
        self.runs_kept += sum(type(o) is Run for o in gc.get_objects())
        times = {"reference": 10.0, "fp32": 9.0, "w8a8": self.left.pop(0)}
        return Raced({name: (int(times[name] * 1e6),) * 20 for name in artifacts}, lambda _: (), fingerprint())


def searched(recipe: Recipe, tmp_path, race: Scripted, sizes=(1.0,)):
    (tmp_path / "b").mkdir()
    return search(recipe, Budget(5.0, 100.0, sizes), tmp_path / "b", Tools(Cache(None), lambda *_: None, race))


def test_the_bundle_is_made_in_the_precision_that_was_picked(recipe, tmp_path):
    race = Scripted(2.0, 3.0, 4.0)
    found = searched(recipe, tmp_path, race, (1.0, 1.0))
    assert found["search"]["picked"]["precision"] == found["recipe"]["precision"] == "w8a8"
    assert found["targets"][0]["latency_ms"]["p50"] == 4.0 and race.left == []
    assert [p["latency_ms"] for p in found["search"]["points"]] == pytest.approx([2.0, 3.0])
    assert race.runs_kept == 0  # pixels and models of a trial are gone when the next one starts


@pytest.mark.parametrize(("ms", "says"), [(6.0, "got 6 ms in w8a8; 2 ms"), (20.0, "got 9 ms in fp32; 2 ms in w8a8")])
def test_a_bundle_slower_than_its_trial_is_held_to_the_budget(recipe, tmp_path, ms, says):
    with pytest.raises(BudgetError, match=says):
        searched(recipe, tmp_path, Scripted(2.0, ms))


def test_values_as_typed():
    assert shares("1,0.6, 50%") == (1.0, 0.6, 0.5)
    assert (milliseconds("2ms"), milliseconds("0.002s"), milliseconds("2")) == (2.0, 2.0, 2.0)
    for bad in ("fast", "5 m"):
        with pytest.raises(ConfigError):
            milliseconds(bad)
    assert (number_or_auto("0.3"), number_or_auto("auto")) == (0.3, "auto")
    with pytest.raises(ConfigError, match="number or auto"):
        number_or_auto("some")
