"""The devices a user has named: ``devices.json`` in the user's configuration folder. It holds no secrets.

{"schema": 1, "devices": {"pi": {"url": "ssh://pi@192.168.1.20", "python": "python3"}}}
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import ConfigError
from compressor.output import write_text
from compressor.transport import transport

__all__ = ["Device", "add", "default_file", "device", "listed", "remove", "resolve"]

LOCAL = "local"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Device(BaseModel):
    """Where a device is, and the Python there that has vitrim's requirements."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    url: str
    python: str = Field(default="python3", pattern=r"^[^\s\x00-\x1f-][^\x00-\x1f]*$")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = Field(alias="schema")
    devices: dict[Name, Device]


def default_file() -> Path:
    """``$XDG_CONFIG_HOME/vitrim/devices.json``, by default in ``~/.config``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "vitrim" / "devices.json"


def device(url: str, python: str = "python3") -> Device:
    """The device at `url`.

    Raises:
        ConfigError: a URL or Python that cannot be one, or a password in the URL.
    """
    transport(url)
    try:
        return Device(url=url, python=python)
    except ValidationError as error:
        raise ConfigError(f"device: {_first(error)}") from None


def listed(file: Path) -> dict[str, Device]:
    """Every device by name; none when there is no file.

    Raises:
        ConfigError: the file is not what `add` writes.
    """
    if not file.exists():
        return {}
    try:
        return _File.model_validate_json(file.read_bytes()).devices
    except ValidationError as error:
        raise ConfigError(f"{file}: {_first(error)}", hint="Correct the file, or remove it.") from None


def add(file: Path, name: str, named: Device) -> None:
    """Name a device, in place of one of the same name.

    Raises:
        ConfigError: a name that cannot be one.
    """
    _write(file, {**listed(file), name: named})


def remove(file: Path, name: str) -> None:
    """Forget the device `name`.

    Raises:
        ConfigError: there is none.
    """
    devices = listed(file)
    if name not in devices:
        known = f"one of {', '.join(devices)}" if devices else "in the inventory, which is empty"
        raise ConfigError(f"device must be {known}, got {name!r}.", hint="See `vitrim device list`.")
    _write(file, {other: device for other, device in devices.items() if other != name})


def resolve(name: str | None, file: Path) -> Device | None:
    """The device that ``--device name`` means: a URL, a name in the inventory, or None for this machine.

    Raises:
        ConfigError: neither a URL nor a known name.
    """
    if name is None or name == LOCAL:
        return None
    if "://" in name:
        return device(name)
    devices = listed(file)
    if name not in devices:
        raise ConfigError(
            f"device must be a URL, or one of {', '.join([LOCAL, *devices])}, got {name!r}.",
            hint="Give ssh://user@host or adb://SERIAL, or name it first: vitrim device add NAME URL.",
        )
    return devices[name]


def _write(file: Path, devices: dict[str, Device]) -> None:
    if LOCAL in devices:
        raise ConfigError(f"device name must not be {LOCAL!r}, which is this machine.")
    content: dict[str, Any] = {"schema": 1, "devices": {n: d.model_dump() for n, d in sorted(devices.items())}}
    try:
        _File.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"device: {_first(error)}", hint="Names are letters, digits, dot, dash, underscore."
        ) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1) + "\n")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])} is not valid: {first['msg']}."
