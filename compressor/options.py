"""Values as people type them on the command line."""

from __future__ import annotations

from compressor.errors import ConfigError

__all__ = ["share"]


def share(text: str | None) -> float | None:
    """A share from ``"5%"`` or ``"0.05"``; None stays None.

    Raises:
        ConfigError: not a number.

    >>> share("5%"), share("0.05"), share(None)
    (0.05, 0.05, None)
    """
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"A share must be a number such as 5% or 0.05, got {text!r}.") from None
