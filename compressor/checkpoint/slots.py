"""The tensors of any family under one set of names ("slots"), found through the family's table.

A table maps a slot to the names it has in the family's files, separated by `` | ``. In both, ``#`` stands for a block number
and ``*`` for ``weight`` or ``bias``. Slots are those of `VitSpec.shapes`, and besides

    cls, dist, reg   (1, n, C)      class, distillation and register tokens
    pos              (1, L, C)      positions of the patches, and of none, one or all of the prefix tokens
    blocks.#.qkv.*   (3A, C)        packed q, k and v, where a family packs them
    blocks.#.fc1.*   (2M, C)        packed gate and fc1, where a family packs them
    blocks.#.ls1, .ls2  (C,)        LayerScale
    fc_norm.*        (C,)           the norm behind the pooling, instead of norm.*
    head_dist.*      (K, C)         the distillation head
    ignored          any            not needed to classify: mask token, pooler
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from compressor.checkpoint.tensors import Tensors
from compressor.errors import CheckpointError, UnsupportedModel
from compressor.types import Array

__all__ = ["Slots", "Table"]

Table = Mapping[str, str]


class Slots:
    """One checkpoint's tensors by slot; remembers which were read.

    Args:
        tensors: the file.
        table: slot -> names, as above.
        prefix: of the file's names, left out where a name does not have it.

    Raises:
        UnsupportedModel: the first tensor that no name of the table matches.
        CheckpointError: two tensors for one slot, or a block is missing.
    """

    def __init__(self, tensors: Tensors, table: Table, prefix: str = "") -> None:
        self.tensors, self._prefix = tensors, prefix
        self._table = {slot: names.split(" | ") for slot, names in table.items()}
        self._styles: dict[str, str] = {}  # slot of the table -> which of its names this file uses
        self._names: dict[str, str] = {}
        patterns = [(_pattern(style), style, slot) for slot, styles in self._table.items() for style in styles]
        for name in tensors.shapes:
            slot = self._slot(name.removeprefix(prefix), patterns)
            if slot is None:
                raise _unsupported(name, tensors.where)
            if slot in self._names and slot != "ignored":
                raise CheckpointError(
                    f"{tensors.where}: tensors {self._names[slot]!r} and {name!r} must not both be there."
                )
            self._names[slot] = name
        self._unread = set(self._names) - {"ignored"}
        numbers = {int(slot.split(".")[1]) for slot in self._names if slot.startswith("blocks.")}
        self.depth = len(numbers)
        for i in range(self.depth):
            if i not in numbers:
                raise CheckpointError(f"{tensors.where}: block {i} is missing, though block {max(numbers)} is there.")
        if not numbers:
            raise CheckpointError(f"{tensors.where}: the file must hold at least one transformer block, got none.")

    def has(self, slot: str) -> bool:
        """Whether the file has this slot; with ``#``, in any block."""
        if "#" not in slot:
            return slot in self._names
        return any(slot.replace("#", str(i)) in self._names for i in range(self.depth))

    def knows(self, slot: str) -> bool:
        """Whether the family's table has this slot, in the file or not."""
        return slot in self._table or slot.rpartition(".")[0] + ".*" in self._table

    def shape(self, slot: str, ndim: int) -> tuple[int, ...]:
        """The shape of a slot that must be there with `ndim` axes, none of them empty."""
        shape = self.tensors.shapes[self._name(slot)]
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(
                f"{self.tensors.where}: tensor {self._name(slot)!r} must have {ndim} non-empty axes, got {shape}."
            )
        return shape

    def take(self, slot: str, shape: tuple[int, ...]) -> Array:
        """The float32 array of a slot that must be there with this shape."""
        name = self._name(slot)
        if self.tensors.shapes[name] != shape:
            raise CheckpointError(
                f"{self.tensors.where}: tensor {name!r} must have shape {shape}, got {self.tensors.shapes[name]}."
            )
        self._unread.discard(slot)
        return self.tensors.read(name)

    def finish(self) -> None:
        """Refuse the file when a tensor was not read: what it does would be lost.

        Raises:
            UnsupportedModel: naming the first such tensor.
        """
        for slot, name in self._names.items():
            if slot in self._unread:
                raise UnsupportedModel(
                    f"{self.tensors.where}: tensor {name!r} is not used by the model that its config or arch describes.",
                    hint="Check that the weights and the architecture belong together.",
                )

    def _name(self, slot: str) -> str:
        if slot in self._names:
            return self._names[slot]
        part = slot.rpartition(".")[2]
        number = re.search(r"\d+", slot)
        row = re.sub(r"\.\d+\.", ".#.", slot)
        row = row if row in self._table else row.removesuffix(part) + "*"
        style = self._styles.get(row, self._table[row][0])
        name = style.replace("#", number[0] if number else "").replace("*", part)
        name = name if slot.startswith("head") else self._prefix + name
        raise CheckpointError(
            f"{self.tensors.where}: tensor {name!r} is missing.",
            hint="The checkpoint is incomplete or of another model.",
        )

    def _slot(self, name: str, patterns: list[tuple[re.Pattern[str], str, str]]) -> str | None:
        for pattern, style, slot in patterns:
            found = pattern.fullmatch(name)
            if found is not None:
                self._styles[slot] = style
                groups = found.groupdict()
                return slot.replace("#", groups.get("block") or "#").replace("*", groups.get("part") or "*")
        return None


def _unsupported(name: str, where: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where}: tensor {name!r} is not part of a plain Vision Transformer.",
        hint="Supported: ViT, DeiT, DeiT-III, DINOv2 (also with registers) of timm, transformers and torchvision.",
    )


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(?P<block>\d{1,4})").replace(r"\*", "(?P<part>weight|bias)"))
