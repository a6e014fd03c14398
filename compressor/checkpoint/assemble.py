"""Slots -> spec and canonical weights: every family ends here, so folding is done and tested once.

Folded, in float64: the softmax scale D^-0.5 into q (into its norm when there is one), LayerScale into proj and fc2, the two
heads of a distilled model into one linear over both tokens, prefix tokens with their positions into ``prefix``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compressor.checkpoint.positions import Resampling, find_grid, resample
from compressor.checkpoint.slots import Slots
from compressor.errors import CheckpointError
from compressor.types import Array, BlockSpec, MlpKind, Pool, VitSpec

__all__ = ["Facts", "Size", "assemble"]

Size = tuple[int, int]
Linear = tuple[Array, Array]  # weight (out, in) and bias (out,)


@dataclass(frozen=True)
class Facts:
    """What the tensors do not tell.

    Attributes:
        heads: attention heads of every block.
        pool: what the head reads, unless there is a distillation head.
        mlp: activation; ``swiglu`` may be packed into fc1.
        norm_eps: of every LayerNorm.
        image_size: the checkpoint's own, (height, width) in pixels; None: its positions form a square.
        qkv_bias, proj_bias: whether q, k, v and whether proj, fc1, fc2 have biases; else they become zero.
        resampling: of positions, as the family does it.
    """

    heads: int
    pool: Pool = "token"
    mlp: MlpKind = "gelu"
    norm_eps: float = 1e-6
    image_size: Size | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    resampling: Resampling = "antialias"


def assemble(slots: Slots, facts: Facts, image_size: Size | None = None) -> tuple[VitSpec, dict[str, Array]]:
    """Spec and weights at `image_size`, or at the checkpoint's own size when it is None.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the others imply.
        UnsupportedModel: a tensor is left over.
        ConfigError: `image_size` is smaller than a patch or absurdly large.
    """
    width, in_chans, rows, columns = slots.shape("patch.weight", 4)
    weights = {
        "patch.weight": slots.take("patch.weight", (width, in_chans, rows, columns)),
        "patch.bias": slots.take("patch.bias", (width,)),
    }
    prefix = _prefix(slots, width)
    pos, own = _positions(slots, facts, (len(prefix), width), (rows, columns))
    blocks = []
    for i in range(slots.depth):
        block, tensors = _block(slots, f"blocks.{i}", facts, width)
        blocks.append(block)
        weights |= {f"blocks.{i}.{name}": tensor for name, tensor in tensors.items()}
    norm = "fc_norm" if slots.has("fc_norm.weight") else "norm"
    weights |= {f"norm.{part}": slots.take(f"{norm}.{part}", (width,)) for part in ("weight", "bias")}
    pool: Pool = "token_dist" if slots.has("head_dist.weight") else facts.pool
    weights |= _head(slots, pool, width)
    spec = VitSpec(
        image_size=image_size or facts.image_size or (own[0] * rows, own[1] * columns),
        patch_size=(rows, columns),
        in_chans=in_chans,
        embed_dim=width,
        blocks=tuple(blocks),
        prefix_tokens=len(prefix),
        pool=pool,
        num_classes=len(weights["head.bias"]) if "head.bias" in weights else 0,
        norm_eps=facts.norm_eps,
        norm_after_pool=norm == "fc_norm",
    )
    slots.finish()
    covered = len(pos) - own[0] * own[1]
    prefix[:covered] += pos[:covered]
    weights |= {"prefix": prefix, "pos": resample(pos[covered:], own, spec.grid, facts.resampling)}
    return spec, {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in weights.items()}


def _prefix(slots: Slots, width: int) -> Array:
    """(P, C): class, distillation and register tokens, in the order every family puts them."""
    tokens = [np.zeros((0, width), np.float32)]
    for slot in ("cls", "dist", "reg"):
        if slots.has(slot):
            count = slots.shape(slot, 3)[1] if slot == "reg" else 1
            tokens.append(slots.take(slot, (1, count, width))[0])
    return np.concatenate(tokens)


def _positions(slots: Slots, facts: Facts, prefix: tuple[int, int], patch: Size) -> tuple[Array, Size]:
    """(L, C) positions as stored, and their grid."""
    length = slots.shape("pos", 3)[1]
    stated = None
    if facts.image_size is not None:
        stated = facts.image_size[0] // patch[0], facts.image_size[1] // patch[1]
    grid = find_grid(length, prefix[0], stated)
    if grid is None:
        what = f"{stated[0]} x {stated[1]} patches" if stated else "a square of patches"
        raise CheckpointError(
            f"{slots.tensors.where}: positions must cover {what} and up to {prefix[0]} prefix tokens, got {length}.",
            hint="The checkpoint's own image size must be in its config.json; image_size only says what to resample to.",
        )
    return slots.take("pos", (1, length, prefix[1]))[0], grid


def _block(slots: Slots, name: str, facts: Facts, width: int) -> tuple[BlockSpec, dict[str, Array]]:
    (q, k, v), qk_norm = _qkv(slots, name, facts, width)
    attention = len(q[1])
    if attention % facts.heads:
        raise CheckpointError(
            f"{slots.tensors.where}: the number of heads must divide the attention width {attention}, got {facts.heads}."
        )
    dim = attention // facts.heads
    scale = float(dim) ** -0.5
    weights: dict[str, Array] = {}
    if qk_norm:
        parts = [f"{part}_norm.{kind}" for part in ("q", "k") for kind in ("weight", "bias")]
        weights |= {part: slots.take(f"{name}.{part}", (dim,)) for part in parts}
        weights |= {part: _scaled(weights[part], scale) for part in ("q_norm.weight", "q_norm.bias")}
    else:
        q = _scaled(q[0], scale), _scaled(q[1], scale)
    proj = _linear(slots, f"{name}.proj", (width, attention), bias=facts.proj_bias)
    mlp, gate, fc1, fc2 = _mlp(slots, name, facts, width)
    linears = {"q": q, "k": k, "v": v, "proj": _layer_scaled(slots, f"{name}.ls1", proj)}
    linears |= {"gate": gate} if gate is not None else {}
    linears |= {"fc1": fc1, "fc2": _layer_scaled(slots, f"{name}.ls2", fc2)}
    for part, (weight, bias) in linears.items():
        weights |= {f"{part}.weight": weight, f"{part}.bias": bias}
    for norm in ("norm1", "norm2"):
        weights |= {f"{norm}.{part}": slots.take(f"{name}.{norm}.{part}", (width,)) for part in ("weight", "bias")}
    return BlockSpec(facts.heads, dim, dim, len(fc1[1]), mlp, qk_norm), weights


def _qkv(slots: Slots, name: str, facts: Facts, width: int) -> tuple[list[Linear], bool]:
    """q, k and v, each (A, C) and (A,), whether stored packed or apart; and whether q and k are normalised."""
    if slots.knows("blocks.#.qkv.weight"):
        rows = slots.shape(f"{name}.qkv.weight", 2)[0]
        weight, bias = _linear(slots, f"{name}.qkv", (rows - rows % 3, width), bias=facts.qkv_bias)
        parts = list(zip(np.split(weight, 3), np.split(bias, 3), strict=True))
    else:
        rows = slots.shape(f"{name}.q.weight", 2)[0]
        parts = [_linear(slots, f"{name}.{part}", (rows, width), bias=facts.qkv_bias) for part in ("q", "k", "v")]
    return parts, slots.has("blocks.#.q_norm.weight")


def _mlp(slots: Slots, name: str, facts: Facts, width: int) -> tuple[MlpKind, Linear | None, Linear, Linear]:
    hidden = slots.shape(f"{name}.fc2.weight", 2)[1]
    fc2 = _linear(slots, f"{name}.fc2", (width, hidden), bias=facts.proj_bias)
    if slots.has("blocks.#.gate.weight"):
        gate, fc1 = (
            _linear(slots, f"{name}.{part}", (hidden, width), bias=facts.proj_bias) for part in ("gate", "fc1")
        )
        return "swiglu", gate, fc1, fc2
    if facts.mlp == "swiglu":
        weight, bias = _linear(slots, f"{name}.fc1", (2 * hidden, width), bias=facts.proj_bias)
        return "swiglu", (weight[:hidden], bias[:hidden]), (weight[hidden:], bias[hidden:]), fc2
    return facts.mlp, None, _linear(slots, f"{name}.fc1", (hidden, width), bias=facts.proj_bias), fc2


def _head(slots: Slots, pool: Pool, width: int) -> dict[str, Array]:
    if not slots.has("head.weight"):
        return {}
    classes = slots.shape("head.weight", 2)[0]
    pooled = 2 * width if pool == "token_avg" else width
    weight, bias = _linear(slots, "head", (classes, pooled), bias=True)
    if pool == "token_dist":  # at inference the two classifiers are averaged
        other, other_bias = _linear(slots, "head_dist", (classes, width), bias=True)
        weight, bias = np.concatenate([weight, other], axis=1) / 2, (bias + other_bias) / 2
    return {"head.weight": weight, "head.bias": bias}


def _linear(slots: Slots, name: str, shape: tuple[int, int], *, bias: bool) -> Linear:
    weight = slots.take(f"{name}.weight", shape)
    return weight, slots.take(f"{name}.bias", shape[:1]) if bias else np.zeros(shape[0], np.float32)


def _layer_scaled(slots: Slots, slot: str, linear: Linear) -> Linear:
    if not slots.has("blocks.#." + slot.rpartition(".")[2]):
        return linear
    gamma = slots.take(slot, linear[1].shape).astype(np.float64)
    with np.errstate(over="ignore"):  # the model refuses what is not finite
        return (gamma[:, None] * linear[0]).astype(np.float32), (gamma * linear[1]).astype(np.float32)


def _scaled(array: Array, factor: float) -> Array:
    return (array.astype(np.float64) * factor).astype(np.float32)
