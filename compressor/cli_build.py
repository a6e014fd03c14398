"""``vitrim build``: engines made where they run, or only checked where they are planned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.console import Console, Threads, command
from compressor.errors import ConfigError
from compressor.result import Result

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None)


@command(
    app,
    "build",
    "vitrim build b --target tensorrt --device ssh://user@jetson",
    "vitrim build b --target tensorrt-rtx --out ready --json",
    "vitrim build b --target tensorrt --check --chip SM120",
)
def build(
    console: Console,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder or .zip.", show_default=False)],
    target: Annotated[str, typer.Option(help="Target whose build plan is completed.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Completed bundle (default: in place).")] = None,
    chip: Annotated[
        str,
        typer.Option(help="What the engines are for: SM89, ... for tensorrt-rtx; ampere+ or version+ for tensorrt."),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only say what TensorRT-RTX makes of the plans; needs no GPU.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time that engines are tuned for and raced with.")] = 1,
    threads: Threads = 1,
    device: Annotated[
        str, typer.Option(help="Where to build: local, ssh://user@host[:port], adb://SERIAL, or a named device.")
    ] = "local",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
) -> Result:
    """Complete a bundle's build plan on the device: make the engines, prove and race them, seal the fastest."""
    from compressor.build_plan import BuildJob, build_bundle, check_bundle
    from compressor.inventory import default_file, resolve

    where = resolve(device, default_file())
    if check:
        if where is not None or out is not None:
            raise ConfigError("--check must stand without --out and --device: it runs here and writes nothing.")
        return check_bundle(bundle, target, chip)
    job = BuildJob(target, chip, batch, threads)
    if where is None:
        return build_bundle(bundle, job, out, force=force)
    from compressor.remote import build_on

    return build_on(where, bundle, job, out, console.note, force=force)
