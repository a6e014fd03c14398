"""How small may it get? Several sizes built and raced on the target; the best inside the budget becomes the bundle.

Agreement with the unpruned model on held-out calibration images stands for accuracy: the share of changed answers bounds
the accuracy that can be lost, needs no label, and leaves the evaluation images untouched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from compressor.errors import BudgetError, ConfigError
from compressor.intervals import proportion_interval
from compressor.pipeline import Tools, compress, evaluate, load, refuse_early, run_stages
from compressor.recipe import Recipe
from compressor.stages import Images
from compressor.types import Model, latency_ms

__all__ = ["Budget", "Point", "front", "pick", "search"]

HELD_OUT = 5  # every fifth calibration image judges and is not fitted to


@dataclass(frozen=True)
class Budget:
    """What the bundle may cost.

    Args:
        max_latency: milliseconds (p50), None for "as fast as `max_drop` allows".
        max_drop: percent of held-out images whose class may change.
        sizes: shares of the multiply-adds to try; 1.0 is quantization alone.
    """

    max_latency: float | None = None
    max_drop: float = 1.0
    sizes: tuple[float, ...] = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3)

    def __post_init__(self) -> None:
        if not self.sizes or any(not 0 < s <= 1 for s in self.sizes):
            raise ConfigError(f"search: sizes must be shares in (0, 1], got {self.sizes}.")
        if self.max_latency is not None and not self.max_latency > 0:
            raise ConfigError(f"search: max_latency must be positive, got {self.max_latency}.")
        if not 0 <= self.max_drop <= 100:
            raise ConfigError(f"search: max_drop must be a percentage in [0, 100], got {self.max_drop}.")


@dataclass(frozen=True)
class Point:
    """One size, in the precision that won its contest.

    `latency_ms` is the measured ratio to the unpruned float model times that model's median over the whole search, so that
    points raced at different moments can be compared. `agreement` (percent) has its 95 % interval.
    """

    target_macs: float
    precision: str
    params: int
    macs: int
    latency_ms: float
    speedup: float
    agreement: float
    agreement_ci95: tuple[float, float]
    n: int


def search(recipe: Recipe, budget: Budget, folder: Path, tools: Tools) -> dict[str, Any]:
    """The ``vitrim compress --json`` object of the bundle picked, with ``search{points, picked, sentence}``.

    Args:
        recipe: one target; its size options stay unset, they are what is searched.
        budget: limits and sizes.
        folder: empty; receives the bundle.
        tools: cache, progress, race.

    Raises:
        ConfigError: several targets, sizes already set, or a pruner that has no budget.
        BudgetError: no size is inside the budget, or the bundle made of the best one is not.
    """
    picked, found = explore(recipe, budget, tools)
    best = replace(_sized(recipe, picked.target_macs), precision=picked.precision)
    made = compress(best, folder, tools, {"search": found})
    _hold(made, picked, budget)
    return made


def explore(recipe: Recipe, budget: Budget, tools: Tools) -> tuple[Point, dict[str, Any]]:
    """The best size inside the budget, and ``search{points, picked, sentence, budget}``; no bundle is made.

    Raises:
        ConfigError: see `search`.
        BudgetError: no size is inside the budget.
    """
    if len(recipe.targets) != 1 or recipe.prunes or recipe.pruner != "obs":
        raise ConfigError(
            "search must have one target, the pruner obs, and no size options: sizes are what it tries.",
            hint="For example: vitrim search demo --target ort --max-drop 1.0 --out b",
        )
    refuse_early(recipe)
    reference, images = load(recipe, tools)
    every = range(len(images.calibration))
    fitted = images.calibration.subset([i for i in every if i % HELD_OUT])
    judges = images.calibration.subset([i for i in every if i % HELD_OUT == 0])
    trials = []
    for done, size in enumerate(budget.sizes, 1):
        trials.append(_try(_sized(recipe, size), size, reference, Images(fitted, judges, None), tools))
        tools.progress("sizes tried", done, len(budget.sizes))
    usual = median(ms for _, ms in trials)
    points = tuple(replace(point, latency_ms=usual / point.speedup) for point, _ in trials)
    picked, best = pick(points, budget), front(points)
    sentence = (
        f"{picked.target_macs:.0%} of the MACs in {picked.precision}: {picked.latency_ms:.3g} ms, {picked.agreement:.1f} % of "
        f"{picked.n} held-out images keep their class when tried; picked from {len(points)} sizes."
    )
    rows = [{**asdict(p), "on_front": p in best} for p in points]
    return picked, {"points": rows, "picked": asdict(picked), "sentence": sentence, "budget": asdict(budget)}


def _sized(recipe: Recipe, size: float) -> Recipe:
    return replace(recipe, target_macs=None if size == 1 else size)


def _try(recipe: Recipe, size: float, reference: Model, images: Images, tools: Tools) -> tuple[Point, float]:
    """What `recipe` costs and keeps, and the unpruned model's median in its race, milliseconds; nothing else is kept."""
    with tempfile.TemporaryDirectory(prefix="vitrim-") as temporary:
        run = run_stages(recipe, reference, images, Path(temporary), tools)
        found = evaluate(run, tools.progress)[recipe.targets[0]]
    (outcome,), n = run.outcomes, int(found["n"])
    before, after = latency_ms(outcome.reference_ns)["p50"], outcome.kept.p50
    low, high = proportion_interval(round(found["agreement"] * n / 100), n)
    point = Point(
        size,
        outcome.kept.artifact.precision,
        run.model.params,
        run.model.spec.macs(),
        after,
        before / after,
        found["agreement"],
        (100 * low, 100 * high),
        n,
    )
    return point, before


def _hold(made: Mapping[str, Any], picked: Point, budget: Budget) -> None:
    """Raise BudgetError where the bundle, fitted on every image and raced anew, is slower than its trial promised."""
    (target,) = made["targets"]
    ms = target["latency_ms"]["p50"]
    if budget.max_latency is not None and ms > budget.max_latency:
        raise BudgetError(
            f"search: the bundle must take at most {budget.max_latency:g} ms, got {ms:.3g} ms in {target['precision']}; "
            f"{picked.latency_ms:.3g} ms in {picked.precision} when tried.",
            hint="Run it again on an idle machine, raise --max-latency, or try smaller --sizes.",
        )


def front(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """The points that no other beats in both latency and agreement, fastest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.latency_ms, -p.agreement)):
        if not found or point.agreement > found[-1].agreement:
            found.append(point)
    return tuple(found)


def pick(points: tuple[Point, ...], budget: Budget) -> Point:
    """The best point inside the budget: with a latency limit the one that agrees most, without one the fastest.

    Raises:
        BudgetError: there is none; the sentence names the nearest.
    """
    close = [p for p in points if 100 - p.agreement <= budget.max_drop]
    if budget.max_latency is None:
        if close:
            return min(close, key=lambda p: p.latency_ms)
        best = max(points, key=lambda p: p.agreement)
        raise BudgetError(
            f"search: at most {budget.max_drop:g} % of the answers must change, got {100 - best.agreement:.2g} % at best, with "
            f"{best.target_macs:.0%} of the MACs.",
            hint="Raise --max-drop, or give more calibration images.",
        )
    fit = [p for p in close if p.latency_ms <= budget.max_latency]
    if fit:
        return max(fit, key=lambda p: (p.agreement, -p.latency_ms))
    best = min(close or points, key=lambda p: p.latency_ms)
    raise BudgetError(
        f"search: a size must take at most {budget.max_latency:g} ms and change at most {budget.max_drop:g} % of the answers, "
        f"got {best.latency_ms:.3g} ms and {100 - best.agreement:.2g} % at best, with {best.target_macs:.0%} of the MACs.",
        hint="Raise --max-latency or --max-drop, or try smaller --sizes.",
    )
