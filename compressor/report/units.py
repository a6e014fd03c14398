"""How a page writes numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["count", "fewer", "ms", "size", "times"]

Json = Mapping[str, Any]


def ms(value: float) -> str:
    """Three significant digits, trailing zeros kept: 2.00 ms."""
    return f"{value:#.3g}".rstrip(".") + " ms"


def times(ratio: float) -> str:
    """A speed-up in words."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def fewer(before: Json, after: Json, key: str) -> str:
    """How much of `key` is gone."""
    share = 1 - after[key] / before[key]
    return f"{100 * share:.0f} % fewer" if share > 0.005 else "unchanged"


def size(bytes_: float) -> str:
    """Of a file."""
    return f"{bytes_ / 1e6:.2f} MB" if bytes_ >= 1e6 else f"{bytes_ / 1e3:.1f} kB"


def count(value: float) -> str:
    """Of parameters or multiplies, with the prefix that leaves one to three digits before the point."""
    for scale, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.2f}{suffix}"
    return f"{value:g}"
