"""What pruning hands back: the smaller model, and one row per block and part saying what was done and how well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compressor.types import Model

__all__ = ["BlockReport", "Part", "Pruned"]

Part = Literal["mlp", "qk", "vo", "heads", "block"]


@dataclass(frozen=True)
class BlockReport:
    """What happened to one part of one block.

    Errors are squared and relative: energy of the change over energy of the dense quantity. `predicted` comes from the
    statistics the choice was made on: of the logits for "qk", of the network's output for "block", else of what the
    branch had to contribute. `measured` is the distance of the token stream behind the branch to the dense one, on the
    calibration images and with everything before it compressed too; None where it was not measured.
    """

    block: int  # index in the dense model
    part: Part
    before: int
    after: int
    predicted: float
    damping: float
    measured: float | None = None
    fallback: str = ""  # what was done instead of the first choice, and why; empty when nothing was


@dataclass(frozen=True, eq=False)
class Pruned:
    """The compressed model and the report of every block that was touched."""

    model: Model
    blocks: tuple[BlockReport, ...]

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Every fallback taken, naming its block and part."""
        return tuple(f"blocks.{b.block} {b.part}: {b.fallback}" for b in self.blocks if b.fallback)
