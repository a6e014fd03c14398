"""``vitrim search``: sizes tried on the target, the best inside a budget kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.console import CLOTHES, Console, Threads, command
from compressor.result import Result

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)


@command(
    app,
    "search",
    "vitrim search demo --target ort --max-drop 1.0 --out b",
    "vitrim search my_model/ --data photos/ --eval val/ --target openvino --max-latency 5ms --out b --json",
)
def search_sizes(
    console: Console,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for compress.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Bundle to write (default: only say which is best).")] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration images; every fifth judges and is not fitted to (default: demo).")
    ] = None,
    target: Annotated[str, typer.Option(help="Target that decides.")] = "ort",
    max_latency: Annotated[
        str | None, typer.Option(help="p50 allowed, e.g. 5ms (default: as fast as possible).")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="Percent of held-out answers that may change.")] = 1.0,
    sizes: Annotated[str, typer.Option(help="Shares of the MACs to try.")] = "1,0.8,0.6,0.5,0.4,0.3",
    eval: Annotated[
        str | None, typer.Option(help="Labelled images, for the final accuracy; they choose nothing.")
    ] = None,
    precision: Annotated[str, typer.Option(help="As for compress.")] = "auto",
    calib_size: Annotated[int, typer.Option(help="Calibration images used, at most.")] = 512,
    arch: Annotated[str | None, typer.Option(help="Architecture of a bare weights file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    threads: Threads = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do every stage again.")] = False,
) -> Result:
    """Try several sizes on the target, show what each costs and keeps, and bundle the best one inside the budget."""
    from compressor import show
    from compressor.cache import Cache, default_folder
    from compressor.options import milliseconds, shares
    from compressor.output import file_or_folder
    from compressor.pipeline import Tools
    from compressor.recipe import Recipe
    from compressor.search import Budget, explore, search

    if data is None and model != "demo":
        console.note(CLOTHES)
    chosen = {"precision": precision, "calib_size": calib_size, "arch": arch, "seed": seed, "threads": threads}
    recipe = Recipe(model, data or "demo", (target,), eval, **chosen)  # type: ignore[arg-type]
    budget = Budget(milliseconds(max_latency), max_drop, shares(sizes))
    tools = Tools(Cache(None if no_cache else default_folder()), console.progress)
    if out is None:
        _, tried = explore(recipe, budget, tools)
        return Result({"bundle": None, "search": tried}, show.searched(tried))
    with file_or_folder(out, force=force, zipped=out.suffix == ".zip") as folder:
        found = search(recipe, budget, folder, tools)
    found = {"bundle": str(out), **found}
    return Result(found, [*show.searched(found["search"]), *show.compressed(found)])
