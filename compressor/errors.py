"""The exception tree. Every error a user can cause is one of these; anything else is our bug.

    VitrimError                exit code 2 unless said otherwise
    ├── ConfigError            an option, recipe key or combination that cannot work
    ├── CheckpointError        a checkpoint that is missing, damaged or not what it claims to be
    ├── DataError              images or labels that cannot be read or used
    ├── UnsupportedModel       a network vitrim does not represent (named by its first unknown tensor)
    ├── ParityError            a built artifact that does not compute what the model computes   (exit code 1)
    ├── BudgetError            nothing meets the limits that were set                           (exit code 1)
    ├── TargetUnavailable      a runtime or vendor tool that is not installed or failed         (exit code 3)
    └── BundleError            a bundle that is damaged, tampered with or incomplete

The text of an error says where, what must be which rule, what it got; `hint` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ParityError",
    "TargetUnavailable",
    "UnsupportedModel",
    "VitrimError",
    "unknown_name",
]


class VitrimError(Exception):
    """Any failure with a cause the user can act on.

    Attributes:
        hint: what to do about it, one sentence; may be empty.
        exit_code: the process exit code the command line returns.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def code(self) -> str:
        """Stable machine-readable name, e.g. ``"DataError"``."""
        return type(self).__name__


class ConfigError(VitrimError):
    """An option, a recipe key or a combination of them that cannot work."""


class CheckpointError(VitrimError):
    """A checkpoint that is missing, damaged or not what it claims to be."""


class DataError(VitrimError):
    """Images or labels that cannot be read or used."""


class UnsupportedModel(VitrimError):
    """A network that is not a plain Vision Transformer, named by its first unknown tensor."""


class ParityError(VitrimError):
    """A built artifact whose outputs are not those of the model it was built from."""

    exit_code = 1


class BudgetError(VitrimError):
    """Nothing that was built meets the limits that were set."""

    exit_code = 1


class TargetUnavailable(VitrimError):
    """A runtime or vendor tool that is not installed, or that failed."""

    exit_code = 3


class BundleError(VitrimError):
    """A bundle that is damaged, tampered with or incomplete."""


def unknown_name(what: str, got: str, known: Iterable[str]) -> ConfigError:
    """A ConfigError that lists the known names and suggests the nearest.

    >>> str(unknown_name("target", "openvin", ["ort", "openvino"]))
    "target must be one of openvino, ort, got 'openvin'."
    >>> unknown_name("target", "openvin", ["ort", "openvino"]).hint
    "Did you mean 'openvino'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(got, names, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(names)}."
    return ConfigError(f"{what} must be one of {', '.join(names)}, got {got!r}.", hint=hint)
