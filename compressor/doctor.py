"""What can run here: targets with their versions, the CPU, and for everything missing the command that installs it."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable

import targets
from compressor import __version__
from compressor.device import fingerprint
from compressor.errors import ConfigError
from compressor.result import Result

__all__ = ["examine", "install"]

SHORT = {"trt-rtx": "tensorrt-rtx"}  # as the vendor's packages abbreviate it


def examine() -> Result:
    """The ``vitrim doctor --json`` object and its page; never fails because something is missing."""
    states = {name: targets.get(name).available() for name in targets.names()}
    rows = [
        {"name": n, "available": s.available, "runs": s.runs, "version": s.version, "reason": s.reason, "fix": s.fix}
        for n, s in states.items()
    ]
    compress = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("onnx_ir") is not None
    found = {
        "vitrim": __version__,
        "python": platform.python_version(),
        "device": fingerprint(),
        "can_compress": compress,
        "fix": "" if compress else "pip install 'vitrim[compress]'",
        "targets": rows,
    }
    lines = [f"vitrim {__version__}, Python {platform.python_version()} ({sys.executable})"]
    cpu = found["device"].get("cpu", {}) if isinstance(found["device"], dict) else {}
    if cpu:
        cores = cpu.get("physical", cpu["logical"])
        lines.append(f"CPU: {cpu['model']}, {cores} cores, {' '.join(cpu['features'])}")
    lines.append("compress: ready" if compress else f"compress: not installed; {found['fix']}")
    for row in rows:
        ready = "ready" if row["runs"] else "builds here, runs elsewhere:"
        state = f"{ready} {row['version']}" if row["available"] else f"missing: {row['reason']}"
        lines.append(f"  {row['name']:<10} {state}")
        if not row["available"] and row["fix"]:
            lines.append(f"  {'':<10} fix: {row['fix']}")
    return Result(found, lines)


def install(name: str, note: Callable[[str], None]) -> Result:
    """Create the virtual environment that target `name`'s vendor tool needs; `note` gets one sentence per step.

    Raises:
        ConfigError: the target has no environment of its own; the hint says what to install instead.
        TargetUnavailable: the installation failed.
    """
    name = SHORT.get(name, name)
    target = targets.get(name)
    make = getattr(target, "install", None)
    if make is None:
        state = target.available()
        hint = "It is ready." if state.available else f"Install it: {state.fix}"
        known = ", ".join(n for n in targets.names() if hasattr(targets.get(n), "install")) or "none"
        raise ConfigError(
            f"--install must name a target with an environment of its own ({known}), got {name!r}.", hint=hint
        )
    folder = make(note)
    return Result({"installed": name, "folder": str(folder)}, [f"Installed {name} in {folder}"])
