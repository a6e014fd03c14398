"""Targets by name: one file of this folder each, and installed packages of the entry-point group ``vitrim.targets``."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, NoReturn, Protocol, cast

from compressor.errors import ConfigError, TargetUnavailable, unknown_name
from compressor.types import Artifact, Availability, BuildOptions, Capabilities, Session

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Target", "get", "names", "variants"]

GROUP = "vitrim.targets"


class Target(Protocol):
    """What a target file defines; a module is one."""

    NAME: str
    CAPABILITIES: Capabilities

    def available(self) -> Availability:
        """Whether the target can build and run here."""
        ...

    def build(self, graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
        """The files of `graph` for this target, written under ``options.out_dir``."""
        ...

    def open(self, artifact: Artifact, threads: int = 1) -> Session:
        """A session that runs `artifact` on `threads` threads."""
        ...


def names() -> tuple[str, ...]:
    """Sorted names of every target, available here or not.

    >>> {"null", "ort", "openvino"} <= set(names())
    True
    """
    return tuple(sorted(_registry()))


def get(name: str) -> Target:
    """The target called `name`; importing it loads no runtime.

    Raises:
        ConfigError: no target has that name, two have the same, or a third-party one is incomplete.
    """
    registry = _registry()
    if name not in registry:
        raise unknown_name("target", name, registry)
    return registry[name]


def variants(name: str, artifact: Artifact) -> tuple[Artifact, ...]:
    """`artifact`, then the same files under other settings where target `name` offers some that may be faster."""
    offered = getattr(get(name), "variants", None)
    return offered(artifact) if offered else (artifact,)


def _registry() -> dict[str, Target]:
    found: dict[str, Target] = {}
    for target, origin in (*_files(), *_plugins()):
        missing = [part for part in ("NAME", "CAPABILITIES", "available", "build", "open") if not hasattr(target, part)]
        if missing:
            raise ConfigError(
                f"Target {origin} must define NAME, CAPABILITIES, available, build and open, got no {missing[0]}."
            )
        if target.NAME in found:
            raise ConfigError(f"Target names must be unique, got {target.NAME!r} twice, the second from {origin}.")
        found[target.NAME] = target
    return found


def _files() -> list[tuple[Target, str]]:
    modules = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [(cast(Target, importlib.import_module(f"{__name__}.{name}")), f"targets/{name}.py") for name in modules]


def _plugins() -> list[tuple[Target, str]]:
    return [(_plugin(point), f"entry point {point.name} = {point.value}") for point in entry_points(group=GROUP)]


def _plugin(point: EntryPoint) -> Target:
    try:
        return cast(Target, point.load())
    except Exception as error:  # noqa: BLE001 of somebody else's code; `vitrim doctor` says it, other targets work
        return _Broken(point.name, f"{point.value} does not load: {type(error).__name__}: {error}")


class _Broken:
    """A third-party target that does not load, under the name of its entry point."""

    CAPABILITIES = Capabilities(layout="tokens", opset=20, precisions=())

    def __init__(self, name: str, reason: str) -> None:
        self.NAME, self._reason = name, reason

    def available(self) -> Availability:
        return Availability(available=False, reason=self._reason, fix="Repair or remove the package that brings it.")

    def build(self, graph: onnx_ir.Model, options: BuildOptions) -> NoReturn:
        del graph, options  # Unused
        self._refuse()

    def open(self, artifact: Artifact, threads: int = 1) -> NoReturn:
        del artifact, threads  # Unused
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TargetUnavailable(f"Target {self.NAME!r}: {self._reason}.", hint=self.available().fix)
