"""Whether a runtime's Python package is here and loads: an installed one may still lack a shared library of the system."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from compressor.errors import TargetUnavailable
from compressor.types import Availability

__all__ = ["loads", "require"]


def loads(package: str, fix: str) -> Availability:
    """Whether `package` can be imported, with its version; where it cannot, `fix` says what to do."""
    if find_spec(package) is None:
        return Availability(available=False, reason=f"{package} is not installed", fix=fix)
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError) as error:
        return Availability(available=False, reason=f"{package} is installed but does not load: {error}", fix=fix)
    return Availability(available=True, version=module.__version__)


def require(target: str, package: str, fix: str) -> None:
    """Raises TargetUnavailable, with `fix` as its hint, unless `package` is here and loads."""
    if find_spec(package) is None:
        raise TargetUnavailable(f"Target {target!r} must have {package} installed, got none.", hint=fix)
    state = loads(package, fix)
    if not state.available:
        raise TargetUnavailable(f"Target {target!r} must have {package} that loads: {state.reason}.", hint=fix)
