"""Values as people type them on the command line."""

from __future__ import annotations

from typing import Literal

from compressor.errors import ConfigError

__all__ = ["milliseconds", "number_or_auto", "share", "shares"]


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


def shares(text: str) -> tuple[float, ...]:
    """Shares from ``"1,0.6,50%"``.

    Raises:
        ConfigError: one of them is not a number.

    >>> shares("1,0.6,50%")
    (1.0, 0.6, 0.5)
    """
    return tuple(found for part in text.split(",") if (found := share(part.strip())) is not None)


def milliseconds(text: str | None) -> float | None:
    """Milliseconds from ``"5ms"``, ``"0.5s"`` or ``"5"``; None stays None.

    Raises:
        ConfigError: not a duration.

    >>> milliseconds("5ms"), milliseconds("0.5s"), milliseconds("5"), milliseconds(None)
    (5.0, 500.0, 5.0, None)
    """
    if text is None:
        return None
    number, factor = (
        (text[:-2], 1.0) if text.endswith("ms") else (text[:-1], 1e3) if text.endswith("s") else (text, 1.0)
    )
    try:
        return float(number) * factor
    except ValueError:
        raise ConfigError(f"A duration must be a number such as 5ms or 0.5s, got {text!r}.") from None


def number_or_auto(text: str | None) -> float | Literal["auto"] | None:
    """A number from ``"0.1"``; ``"auto"`` and None stay what they are.

    Raises:
        ConfigError: neither.

    >>> number_or_auto("0.1"), number_or_auto("auto")
    (0.1, 'auto')
    """
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"A value must be a number or auto, got {text!r}.") from None
