"""Kernels, not files: which multiply-adds a runtime executed in integers, and why the others were not. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.roofline import Place, places, work
from compressor.types import OpRecord, VitSpec

__all__ = ["FloatPart", "int8_share"]

EIGHT_BITS = ("int8", "fp8")
PRODUCTS = ("MatMul", "Gemm", "Conv", "FullyConnected", "Attention")  # how the types of multiplying nodes begin or end


@dataclass(frozen=True)
class FloatPart:
    """A part of the network whose products ran in float.

    Attributes:
        name: ``blocks.3.fc1``, ``patch``, ``head``; ``attention`` stands for both products of every block.
        precision: the runtime executed.
        mac_share: of the whole network.
        reason: whose decision it was.
    """

    name: str
    precision: str
    mac_share: float
    reason: str


def int8_share(
    ops: Sequence[OpRecord], spec: VitSpec, kept_float: Collection[str] = (), *, weight_only: bool = False
) -> dict[str, Any]:
    """``int8_mac_share`` (8-bit floats too; None without a table of nodes), ``float_parts``, from what a runtime executed.

    Args:
        ops: the runtime's own table.
        spec: of the model that ran.
        kept_float: sites that our plan left in float, as ``blocks.3.fc1``.
        weight_only: whether the plan stores integers but multiplies floats.
    """
    nodes: dict[Place, list[OpRecord]] = {}
    for op, place in zip(ops, places(ops), strict=True):
        nodes.setdefault(place, []).append(op)
    if not nodes:
        return {"int8_mac_share": None, "float_parts": []}
    macs = {place: sizes[0] for place, sizes in work(spec).items()}
    total = sum(macs.values())
    integer = 0.0
    rest: dict[tuple[str, str, str], float] = {}
    for place, amount in macs.items():
        precisions = _multiplied(nodes.get(place, []))
        share = _integer_part(precisions, place, spec)
        integer += share * amount
        if share < 1:
            name = _name(place)
            key = (
                name,
                next(p for p in precisions if p not in EIGHT_BITS),
                _reason(name, place, kept_float, weight_only=weight_only),
            )
            rest[key] = rest.get(key, 0.0) + (1 - share) * amount
    parts = [FloatPart(name, precision, amount / total, why) for (name, precision, why), amount in rest.items()]
    return {"int8_mac_share": integer / total, "float_parts": [asdict(part) for part in parts]}


def _multiplied(nodes: Sequence[OpRecord]) -> list[str]:
    """Precisions of the products among the nodes of one part; where a fused node hides them, of the one that is named after
    an attention product, else of the longest."""
    products = [op for op in nodes if any(op.type.startswith(p) or op.type.endswith(p) for p in PRODUCTS)]
    named = [op for op in nodes if op.name.rpartition(".")[2] in ("scores", "values")]
    longest = sorted(nodes, key=lambda op: op.time_ms)[-1:]
    return [name for op in products or named or longest for name in op.precision.split("+")] or ["not seen"]


def _integer_part(precisions: Sequence[str], place: Place, spec: VitSpec) -> float:
    """Share of the multiply-adds of `place` in 8 bits; q k^T and the product with v count by their widths."""
    widths = [1] * len(precisions)
    if place[0] is not None and place[1] == "attention" and len(precisions) == 2:
        widths = [spec.blocks[place[0]].qk_dim, spec.blocks[place[0]].v_dim]
    return sum(w for w, p in zip(widths, precisions, strict=True) if p in EIGHT_BITS) / sum(widths)


def _name(place: Place) -> str:
    block, part = place
    return part if block is None or part == "attention" else f"blocks.{block}.{part}"


def _reason(name: str, place: Place, kept_float: Collection[str], *, weight_only: bool) -> str:
    if place[1] == "attention":
        return "the plan: a product of two activations stays in float"
    if name in kept_float:
        return "the plan: too sensitive"
    return "the plan: only the weights are integers" if weight_only else "the runtime chose a float kernel"
