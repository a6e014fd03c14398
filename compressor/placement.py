"""What of a model will not run on an accelerator, said before anything is built and without the vendor's tools.

The graph is the one that `vitrim compress` would hand to the compiler; each target's table of constraints, with its sources, is
data beside it (`targets/_NAME_constraints.py`). A table knows less than the compiler does: what it names will not run there,
what it does not name may still surprise, and `vitrim compress --require-npu` asks the compiler itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import targets
from compressor.errors import ConfigError
from compressor.types import Model, VitSpec

__all__ = ["place"]


def place(model: Model, name: str, chip: str = "") -> dict[str, Any]:
    """What ``vitrim inspect --target name --json`` adds for `model`.

    Returns:
        target, chip (empty: the target's own choice), operations (their number), unsupported (op, name, reason, source of each),
        widths (name, width, multiple, padded, source of each that the chip pads).

    Raises:
        ConfigError: the target has no table of constraints, or does not know the chip.
    """
    from compressor.lower import lower
    from targets._constraints import check

    target = targets.get(name)
    known = [other for other in targets.names() if hasattr(targets.get(other), "constraints")]
    if name not in known:
        raise ConfigError(
            f"--target of inspect must be an accelerator with a compiler ({', '.join(known)}), got {name!r}."
        )
    table = target.constraints(chip)  # type: ignore[attr-defined]
    graph = lower(model, target.CAPABILITIES)
    padded = [
        {
            "name": what,
            "width": width,
            "multiple": table.width_multiple,
            "padded": width + missing,
            "source": table.width_source,
        }
        for what, width in _channels(model.spec)
        if (missing := -width % table.width_multiple)
    ]
    found = [asdict(finding) for finding in check(graph, table)]
    return {"target": name, "chip": chip, "operations": len(graph.graph), "unsupported": found, "widths": padded}


def _channels(spec: VitSpec) -> Iterable[tuple[str, int]]:
    """Every width that becomes channels of a product with weights."""
    yield "embed_dim", spec.embed_dim
    for i, block in enumerate(spec.blocks):
        yield f"blocks.{i}.qk", block.heads * block.qk_dim
        yield f"blocks.{i}.v", block.heads * block.v_dim
        yield f"blocks.{i}.mlp", block.mlp_dim
