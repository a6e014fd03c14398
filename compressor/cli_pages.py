"""The commands that only read what was measured before: ``vitrim compare`` and ``vitrim report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.console import Console, command
from compressor.result import Result

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)


@command(app, "compare", "vitrim compare old/ new/", "vitrim compare a b c.zip --html side-by-side.html --json")
def compare_bundles(
    console: Console,
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Two or more.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Also write the table as one HTML page here.")] = None,
) -> Result:
    """Put bundles side by side: size, precision, accuracy, and the latencies each was made with. Nothing is run."""
    from compressor import show
    from compressor.compare import compare, rows

    found = compare(bundles)
    names, lines = [str(bundle) for bundle in bundles], rows(found["bundles"])
    if html is not None:
        from compressor.output import write_text
        from compressor.report.page import page

        write_text(html, page("compare", names=names, rows=lines, warnings=found["warnings"]))
    return Result(found, show.compared(names, lines, found["warnings"]))


@command(app, "report", "vitrim report b --out report.html", "vitrim report --history gates/")
def report(
    console: Console,
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="A bundle folder or .zip.", show_default=False)
    ] = None,
    history: Annotated[Path | None, typer.Option(help="Folder of `vitrim gate --history`, to plot instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the page (default: beside what it is of).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
) -> Result:
    """Write a bundle's report, or the trend of a gate's history, as one HTML page that needs no network."""
    from compressor.errors import ConfigError
    from compressor.inference import write_history, write_report
    from compressor.output import check_file

    if out is not None:
        check_file(out, force=force)
    if history is not None and bundle is None:
        path = write_history(history, out)
    elif bundle is not None and history is None:
        path = write_report(bundle, out)
    else:
        got = "neither" if bundle is None else "both"
        raise ConfigError(f"report: exactly one of BUNDLE and --history must be given, got {got}.")
    return Result({"report": str(path)}, [f"Wrote {path}"])
