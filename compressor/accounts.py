"""Sentences on chips that are not here, from the JSON of ``vitrim compress``: a compiler's estimate, a build plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["checked", "modelled", "placed"]

Json = Mapping[str, Any]


def modelled(entry: Json, latency_ms: float | None) -> str:
    """What the compiler behind `entry` counts: milliseconds, cycles, or nothing.

    >>> modelled({"subgraphs": [{"cycles": 1_077_000}]}, None)
    '1.08 M cycles counted, no latency'
    """
    if latency_ms is not None:
        return f"{latency_ms:.3g} ms estimated"
    cycles = sum(piece.get("cycles", 0) for piece in entry["subgraphs"])
    return f"{cycles / 1e6:.3g} M cycles counted, no latency" if cycles else "no latency estimate"


def placed(entry: Json) -> str:
    """Where the network runs: the accelerator's share, its pieces, and what is left to the CPU by name.

    >>> placed({"npu_mac_share": 1.0, "subgraphs": [{}], "cpu_ops": []})
    '100 % of MACs on the accelerator, in 1 piece; nothing on the CPU'
    """
    pieces, left = len(entry["subgraphs"]), [op["name"] for op in entry["cpu_ops"]]
    share = f"{100 * entry['npu_mac_share']:.0f} % of MACs on the accelerator, in {pieces} piece{'s' * (pieces != 1)}"
    return f"{share}; on the CPU: {', '.join(left)}" if left else f"{share}; nothing on the CPU"


def checked(found: Json) -> str:
    """What a builder without a device said of a plan, ``checked`` of its entry; empty where there was none."""
    made = found["engines"].values()
    refused = [f"{precision} refused: {why}" for precision, why in found["refused"].items()]
    if not made:
        return f", not checked here ({next(iter(found['refused'].values()))})" if refused else ""
    odd = sum(int(e.get(kind, 0)) for e in made for kind in ("foreign_types", "added_casts"))
    first = next(iter(made))
    said = f", built by {first.get('builder')} for {first.get('chip')} in {', '.join(found['engines'])}"
    kept = "every layer of the type asked for" if not odd else f"{odd} layers or casts of another type than asked for"
    return "; ".join([f"{said}; {kept}", *refused])
