"""Per-node times folded back onto the model, and how close each part is to what this machine can do. Pure functions.

A runtime reports the nodes it executed: ours by our names (``blocks.3.fc1.matmul``), fused ones under names of its own.
`fold` adds them up per block and part; `efficiency` compares each part with the roofline, the larger of arithmetic time
and memory time at the machine's measured peaks.

Source: S. Williams, A. Waterman, D. Patterson 2009, Comm. ACM 52(4) (the roofline model).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.types import BlockSpec, OpRecord, VitSpec

__all__ = ["PARTS", "SILENT", "Part", "Peaks", "Place", "efficiency", "fold", "places", "work"]

PARTS = ("patch", "norm", "qkv", "attention", "proj", "fc1", "act", "fc2", "residual", "head", "other")
NAMED = re.compile(r"^(?:/?[\w]*/)?blocks\.(\d+)\.([a-z_0-9]+)")
# Second word of a node name inside a block -> part. What moves or splits q, k and v counts as attention's overhead.
OF_NAME = {
    **dict.fromkeys(("norm1", "norm2", "q_norm", "k_norm"), "norm"),
    **dict.fromkeys(("q", "k", "v", "qkv"), "qkv"),
    **dict.fromkeys(("scores", "softmax", "values", "heads", "attention", "rows"), "attention"),
    **dict.fromkeys(("attn", "mlp"), "residual"),
    **dict.fromkeys(("act", "gated"), "act"),
    **{name: name for name in ("proj", "fc1", "fc2")},
    "gate": "fc1",
}
OUTSIDE = {
    "patch": "patch",
    "pixels": "patch",
    "tokens": "patch",
    "norm": "norm",
    "pool": "head",
    "head": "head",
    "logits": "head",
}
NORMS, ACTIVATIONS = (
    ("LayerNormalization", "SkipLayerNormalization", "MVN", "BatchNorm"),
    ("BiasGelu", "FastGelu", "Gelu", "Erf"),
)
SILENT = ("Const", "Input", "Output", "Parameter", "Result")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
Place = tuple[int | None, str]


@dataclass(frozen=True)
class Part:
    """One part of one block (`block` None: outside the blocks), its nodes added up.

    Attributes:
        precision: of the node that takes longest.
        placements: where its nodes ran.
        efficiency: share of this machine's roofline, None where it has no multiplications or no peak is known.
    """

    block: int | None
    part: str
    time_ms: float
    share: float
    precision: str
    placements: tuple[str, ...]
    efficiency: float | None = None


@dataclass(frozen=True)
class Peaks:
    """What this machine can do: multiply-adds per second by precision, and bytes per second."""

    macs_per_s: Mapping[str, float]
    bytes_per_s: float


def fold(ops: Sequence[OpRecord]) -> tuple[Part, ...]:
    """Times per block and part, in model order.

    A node under a name of the runtime's own is attributed by its type and its place: a norm belongs to the next named
    node's block, anything else to the previous one's.

    >>> ops = [OpRecord("blocks.0.fc1.matmul", "MatMul", "CPU", "fp32", 3.0)]
    >>> ops += [OpRecord("BiasGelu", "BiasGelu", "CPU", "fp32", 1.0)]
    >>> [(p.block, p.part, p.share) for p in fold(ops)]
    [(0, 'fc1', 0.75), (0, 'act', 0.25)]
    """
    alive = [op for op in ops if op.type not in SILENT]
    groups: dict[Place, list[OpRecord]] = {}
    for op, place in zip(alive, places(alive), strict=True):
        groups.setdefault(place, []).append(op)
    total = sum(op.time_ms for op in alive)

    def part(place: Place, nodes: list[OpRecord]) -> Part:
        time = sum(op.time_ms for op in nodes)
        longest = max(nodes, key=lambda op: op.time_ms)
        where = tuple(sorted({op.placement for op in nodes}))
        return Part(*place, time, time / total if total else 0.0, longest.precision, where)

    def order(place: Place) -> tuple[float, int]:
        block, name = place
        last = float("inf") if name in ("head", "other") else -1.0
        return (last if block is None else float(block)), PARTS.index(name)

    return tuple(part(place, groups[place]) for place in sorted(groups, key=order))


def work(spec: VitSpec) -> dict[Place, tuple[float, float, float]]:
    """Multiply-adds, weights and activations (elements read and written) of every part that multiplies, for one image.

    The last block computes only the rows its pooling reads, as the emitted graph does.
    """
    t, c = spec.tokens, spec.embed_dim
    patches = spec.grid[0] * spec.grid[1]
    pixels = spec.in_chans * spec.patch_size[0] * spec.patch_size[1]
    found: dict[Place, tuple[float, float, float]] = {
        (None, "patch"): (patches * pixels * c, pixels * c, patches * (pixels + c)),
    }
    for i, block in enumerate(spec.blocks):
        rows = t if i + 1 < len(spec.blocks) else {"token": 1, "token_dist": 2}.get(spec.pool, t)
        found |= {(i, name): sizes for name, sizes in _block_work(block, t, c, rows).items()}
    if spec.num_classes:
        size = spec.num_classes * spec.pooled_dim
        found[None, "head"] = (size, size, spec.num_classes + spec.pooled_dim)
    return found


def efficiency(parts: Sequence[Part], spec: VitSpec, peaks: Peaks, *, batch: int = 1) -> tuple[Part, ...]:
    """The parts with their share of the roofline: ideal time / measured time.

    Args:
        parts: from `fold`.
        spec: of the model that ran.
        peaks: measured on the same machine with the same threads.
        batch: images per inference.
    """
    todo = work(spec)

    def share(part: Part) -> float | None:
        sizes, peak = todo.get((part.block, part.part)), peaks.macs_per_s.get(part.precision)
        if sizes is None or peak is None or part.time_ms <= 0:
            return None
        macs, weights, activations = sizes
        width = BYTES.get(part.precision, 4)
        moved = width * (weights + batch * activations)
        ideal_s = max(batch * macs / peak, moved / peaks.bytes_per_s)
        return ideal_s * 1e3 / part.time_ms

    return tuple(Part(**{**vars(part), "efficiency": share(part)}) for part in parts)


def _block_work(block: BlockSpec, t: int, c: int, rows: int) -> dict[str, tuple[float, float, float]]:
    h, qk, v, m = block.heads, block.qk_dim, block.v_dim, block.mlp_dim
    wide = m * (2 if block.mlp == "swiglu" else 1)
    return {
        "qkv": (c * h * (rows * qk + t * (qk + v)), c * h * (2 * qk + v), t * c + h * (rows * qk + t * (qk + v))),
        "attention": (h * rows * t * (qk + v), 0, h * (rows * qk + t * (qk + v) + 2 * rows * t + rows * v)),
        "proj": (rows * h * v * c, h * v * c, rows * (h * v + c)),
        "fc1": (rows * c * wide, c * wide, rows * (c + wide)),
        "fc2": (rows * m * c, m * c, rows * (m + c)),
    }


def places(ops: Sequence[OpRecord]) -> list[Place]:
    """Block (None outside the blocks) and part of every node."""
    named = [_named(op.name) for op in ops]
    following: list[int | None] = [None] * len(ops)
    block: int | None = None
    for i in range(len(ops) - 1, -1, -1):
        block = named[i][0] if named[i] is not None else block  # type: ignore[index]
        following[i] = block
    found, block = [], None
    for op, place, after in zip(ops, named, following, strict=True):
        if place is not None:
            block = place[0]
            found.append(place)
        elif op.type in NORMS:
            found.append((after, "norm"))
        else:
            found.append((block, "act" if op.type in ACTIVATIONS else "other"))
    return found


def _named(name: str) -> Place | None:
    """Block and part that `name` says, None when it is not one of our names."""
    if (match := NAMED.match(name)) is not None:
        return int(match[1]), OF_NAME.get(match[2], "other")
    first = re.split(r"[./_]", name.lstrip("/"), maxsplit=1)[0]
    return (None, OUTSIDE[first]) if first in OUTSIDE else None
