"""Which size is picked from measured points, and how values are typed."""

import pytest

from compressor.errors import BudgetError, ConfigError
from compressor.options import milliseconds, number_or_auto, shares
from compressor.recipe import Recipe
from compressor.search import Budget, Point, front, pick, search


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


def test_values_as_typed():
    assert shares("1,0.6, 50%") == (1.0, 0.6, 0.5)
    assert (milliseconds("2ms"), milliseconds("0.002s"), milliseconds("2")) == (2.0, 2.0, 2.0)
    for bad in ("fast", "5 m"):
        with pytest.raises(ConfigError):
            milliseconds(bad)
    assert (number_or_auto("0.3"), number_or_auto("auto")) == (0.3, None)
    with pytest.raises(ConfigError, match="number or auto"):
        number_or_auto("some")
