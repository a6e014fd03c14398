"""``vitrim gate``: the check that a pull request runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.console import Console, Threads, command
from compressor.result import Result

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)


@command(
    app,
    "gate",
    "vitrim gate new/ --baseline old/",
    "vitrim gate new/ --baseline old/ --max-regression 3% --max-drop 0.5 --junit gate.xml --markdown gate.md",
    "vitrim gate new/ --stored profile.json --json",
)
def gate(
    console: Console,
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The new bundle.", show_default=False)],
    baseline: Annotated[Path | None, typer.Option(help="Bundle to compare with, run now, side by side.")] = None,
    stored: Annotated[
        Path | None, typer.Option(help="Stored `profile --json` to compare with instead; weaker.")
    ] = None,
    max_regression: Annotated[str, typer.Option(help="Slow-down still allowed.")] = "5%",
    confidence: Annotated[float, typer.Option(help="1 - the probability of a wrong decision.")] = 0.99,
    max_drop: Annotated[float | None, typer.Option(help="Accuracy loss still allowed, in points.")] = None,
    max_size_growth: Annotated[str | None, typer.Option(help="Artifact growth still allowed, e.g. 2%.")] = None,
    max_memory_growth: Annotated[str | None, typer.Option(help="Peak memory growth still allowed.")] = None,
    min_int8_share: Annotated[
        str | None, typer.Option(help="Least share of the time spent in int8 kernels, e.g. 60%.")
    ] = None,
    forbid_fallback: Annotated[
        bool, typer.Option("--forbid-fallback", help="No node may fall back to the CPU.")
    ] = False,
    cross_device: Annotated[
        bool, typer.Option("--cross-device", help="Allow a stored profile of another machine.")
    ] = False,
    target: Annotated[str | None, typer.Option(help="Target to run on (default: the first one available).")] = None,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per inference.")] = 1,
    budget: Annotated[float, typer.Option(min=1, help="Seconds after which no pair of processes is begun.")] = 240.0,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a pull-request comment here.")] = None,
    history: Annotated[Path | None, typer.Option(help="Append the outcome to this folder's history.")] = None,
) -> Result:
    """Decide whether a bundle is slower than another: paired, interleaved, sequential. Exit code 0, 1 or 3."""
    from secrets import randbits

    from compressor.duel import DuelConfig
    from compressor.gate import GateConfig
    from compressor.gate.rules import RuleConfig
    from compressor.gating import GateOptions, check_outputs, publish, run_gate
    from compressor.options import share

    growth = (_growth("--max-size-growth", max_size_growth), _growth("--max-memory-growth", max_memory_growth))
    rules = RuleConfig(max_drop, *growth, share(min_int8_share), forbid_fallback)
    slower = _growth("--max-regression", max_regression)
    limits = GateConfig(max_regression=slower or 0.0, confidence=confidence, seed=randbits(32))
    options = GateOptions(target, threads, batch, limits, rules, DuelConfig(budget_s=budget), cross_device)
    check_outputs(junit, markdown, history)
    result = run_gate(candidate, baseline, stored, options, console.progress)
    data = publish(result, candidate, baseline or stored, junit=junit, markdown=markdown, history=history)
    code = {"pass": 0, "fail": 1, "inconclusive": 3}[result.overall.verdict]
    return Result(data, [result.overall.sentence], code)


def _growth(option: str, text: str | None) -> float | None:
    """The share in `text`, None where there is none; "5" is refused, which would be 500 %."""
    from compressor.errors import ConfigError
    from compressor.options import share

    found = share(text)
    if text is None or found is None or text.endswith("%") or not found >= 1:
        return found
    raise ConfigError(
        f"gate: {option} must be a percentage such as 5%, or a share below 1 such as 0.05, got {text!r}.",
        hint=f"Did you mean {option} {text}%?",
    )
