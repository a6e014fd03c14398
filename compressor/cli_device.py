"""``vitrim device``: the inventory of machines that ``--device NAME`` means."""

from __future__ import annotations

from typing import Annotated

import typer

from compressor.console import HELP, Console, command
from compressor.result import Result

__all__ = ["app"]

app = typer.Typer(
    name="device",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=HELP,
    epilog="\b\nExamples:\n  vitrim device add pi ssh://pi@192.168.1.20\n  vitrim profile b --device pi",
    help="Name the machines that --device runs on. No passwords are kept: ssh uses your keys, and never prompts.",
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="As given to --device.", show_default=False)]


@command(
    app,
    "add",
    "vitrim device add pi ssh://pi@192.168.1.20",
    "vitrim device add board ssh://root@board:2222 --python /opt/vitrim/bin/python",
)
def add(
    console: Console,
    name: Name,
    url: Annotated[str, typer.Argument(metavar="URL", help="ssh://user@host[:port] or adb://SERIAL.")],
    python: Annotated[str, typer.Option(help="Python 3.11 or later there that has vitrim's requirements.")] = "python3",
) -> Result:
    """Name a device, or change what a name means. Nothing is contacted."""
    from compressor import inventory

    file, device = inventory.default_file(), inventory.device(url, python)
    inventory.add(file, name, device)
    return Result({"name": name, **device.model_dump(), "file": str(file)}, [f"{name} is {url}, kept in {file}"])


@command(app, "list", "vitrim device list", "vitrim device list --json")
def list_devices(console: Console) -> Result:
    """List the named devices."""
    from compressor import inventory

    file = inventory.default_file()
    devices = {name: device.model_dump() for name, device in inventory.listed(file).items()}
    lines = [f"{name}  {device['url']}  {device['python']}" for name, device in devices.items()]
    return Result({"file": str(file), "devices": devices}, lines or [f"No devices are named in {file}."])


@command(app, "remove", "vitrim device remove pi")
def remove(console: Console, name: Name) -> Result:
    """Forget a named device. Nothing is contacted."""
    from compressor import inventory

    file = inventory.default_file()
    inventory.remove(file, name)
    return Result({"name": name, "file": str(file)}, [f"{name} was removed from {file}"])
