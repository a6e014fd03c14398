"""What a command answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """What a command answers: `data` for ``--json``, `lines` for people, and the exit code."""

    data: dict[str, Any]
    lines: list[Any] = field(default_factory=list)  # str or rich renderables
    exit_code: int = 0
