"""The model as data: sizes, names and shapes of the weights, the contract with its images. Re-exported by `compressor.types`.

Shapes: B batch, N patches, P prefix tokens, T = P + N tokens, C embedding width, H heads, D head width, M MLP width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CheckpointError, ConfigError

__all__ = ["MLP_KINDS", "POOLS", "Array", "BlockSpec", "MlpKind", "Model", "Origin", "Pool", "Preprocess", "VitSpec"]

Array = NDArray[Any]
MlpKind = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Pool = Literal["token", "avg", "token_dist", "token_avg"]

MLP_KINDS: tuple[MlpKind, ...] = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLS: tuple[Pool, ...] = ("token", "avg", "token_dist", "token_avg")


@dataclass(frozen=True)
class BlockSpec:
    """Sizes of one pre-norm transformer block; pruning makes blocks unequal.

    `qk_dim` and `v_dim` are per head. The softmax scale is folded into the query weights by the readers, so there is none here.
    LayerScale is folded into ``proj`` and ``fc2`` likewise.
    """

    heads: int
    qk_dim: int
    v_dim: int
    mlp_dim: int
    mlp: MlpKind = "gelu"
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "qk_dim", "v_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"BlockSpec.{name} must be at least 1, got {getattr(self, name)}.")
        if self.mlp not in MLP_KINDS:
            raise ConfigError(f"BlockSpec.mlp must be one of {', '.join(MLP_KINDS)}, got {self.mlp!r}.")


@dataclass(frozen=True)
class VitSpec:
    """A plain Vision Transformer: everything needed to run it except the numbers.

    `prefix_tokens` counts class, distillation and register tokens; token 0 is the class token when there is one.
    `pool` says what the head reads: ``token`` (token 0), ``avg`` (mean of the patch tokens), ``token_dist`` (tokens 0 and 1
    side by side), ``token_avg`` (token 0 and the patch mean side by side). `num_classes` 0 means the pooled feature is the
    output. `norm_after_pool`: the last norm reads the pooled vector and not every token, for ``token`` and ``avg``.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    blocks: tuple[BlockSpec, ...]
    prefix_tokens: int = 1
    pool: Pool = "token"
    num_classes: int = 1000
    norm_eps: float = 1e-6
    norm_after_pool: bool = False

    def __post_init__(self) -> None:
        for name, least in (("in_chans", 1), ("embed_dim", 1), ("num_classes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"VitSpec.{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"VitSpec.norm_eps must be positive and finite, got {self.norm_eps}.")
        if not self.blocks:
            raise ConfigError("VitSpec.blocks must hold at least one block, got none.")
        if self.pool not in POOLS:
            raise ConfigError(f"VitSpec.pool must be one of {', '.join(POOLS)}, got {self.pool!r}.")
        needed = {"token": 1, "avg": 0, "token_dist": 2, "token_avg": 1}[self.pool]
        if self.prefix_tokens < needed:
            raise ConfigError(f"VitSpec.pool {self.pool!r} must have {needed} prefix tokens, got {self.prefix_tokens}.")
        if self.norm_after_pool and self.pool not in ("token", "avg"):
            raise ConfigError(f"VitSpec.pool must be token or avg with norm_after_pool, got {self.pool!r}.")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or size < patch:
                raise ConfigError(
                    f"VitSpec.image_size must be at least one patch, got {self.image_size} / {self.patch_size}."
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; pixels beyond the last whole patch are not read (convolution with stride)."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def tokens(self) -> int:
        """T, prefix tokens included."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def pooled_dim(self) -> int:
        """Width of what the head reads: C or 2C."""
        return self.embed_dim * (2 if self.pool in ("token_dist", "token_avg") else 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in execution order. This table is the canonical checkpoint format.

        >>> spec = VitSpec((8, 8), (4, 4), 3, 6, (BlockSpec(2, 3, 3, 12),), num_classes=5)
        >>> spec.shapes()["blocks.0.q.weight"], spec.shapes()["pos"], spec.shapes()["head.weight"]
        ((6, 6), (4, 6), (5, 6))
        """
        c, (rows, cols) = self.embed_dim, self.grid
        shapes: dict[str, tuple[int, ...]] = {
            "patch.weight": (c, self.in_chans, *self.patch_size),
            "patch.bias": (c,),
            "prefix": (self.prefix_tokens, c),
            "pos": (rows * cols, c),
        }
        for i, block in enumerate(self.blocks):
            shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block_shapes(block, c).items()}
        # With norm_after_pool the norm reads the pooled vector, whose width is C for every pool that uses it.
        shapes |= {"norm.weight": (c,), "norm.bias": (c,)}
        if self.num_classes:
            shapes |= {"head.weight": (self.num_classes, self.pooled_dim), "head.bias": (self.num_classes,)}
        return shapes

    def macs(self) -> int:
        """Multiplies of linear layers, patch embedding and both attention products, once each, for one image.

        >>> VitSpec((224, 224), (16, 16), 3, 192, (BlockSpec(3, 64, 64, 768),) * 12).macs()
        1253683200
        """
        t, c = self.tokens, self.embed_dim
        total = self.grid[0] * self.grid[1] * c * self.in_chans * self.patch_size[0] * self.patch_size[1]
        for b in self.blocks:
            attention = b.heads * (2 * b.qk_dim + 2 * b.v_dim) * t * c + b.heads * (b.qk_dim + b.v_dim) * t * t
            total += attention + (3 if b.mlp == "swiglu" else 2) * t * c * b.mlp_dim
        return total + self.num_classes * self.pooled_dim

    def params(self) -> int:
        """Number of weights in the canonical form."""
        return sum(int(np.prod(shape)) for shape in self.shapes().values())


def _block_shapes(b: BlockSpec, c: int) -> dict[str, tuple[int, ...]]:
    qk, v, m = b.heads * b.qk_dim, b.heads * b.v_dim, b.mlp_dim
    shapes: dict[str, tuple[int, ...]] = {"norm1.weight": (c,), "norm1.bias": (c,)}
    for name, width in (("q", qk), ("k", qk), ("v", v)):
        shapes |= {f"{name}.weight": (width, c), f"{name}.bias": (width,)}
    if b.qk_norm:
        shapes |= {f"{name}_norm.{part}": (b.qk_dim,) for name in ("q", "k") for part in ("weight", "bias")}
    shapes |= {"proj.weight": (c, v), "proj.bias": (c,), "norm2.weight": (c,), "norm2.bias": (c,)}
    if b.mlp == "swiglu":
        shapes |= {"gate.weight": (m, c), "gate.bias": (m,)}
    return shapes | {"fc1.weight": (m, c), "fc1.bias": (m,), "fc2.weight": (c, m), "fc2.bias": (c,)}


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes the network's input; one contract for calibrate, evaluate and run.

    `resize` ``shorter``: the shorter side becomes ``floor(size / crop)`` and the shape is kept; ``exact``: both sides become
    that (timm's "squash"). Then a centre crop to `size`. `mean` and `std` are per channel on the 0..1 scale.
    """

    size: tuple[int, int]
    crop: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: Literal["RGB", "L"] = "RGB"
    layout: Literal["NCHW"] = "NCHW"
    resize: Literal["shorter", "exact"] = "shorter"

    def __post_init__(self) -> None:
        count = 3 if self.channels == "RGB" else 1
        if len(self.mean) != count or len(self.std) != count:
            raise ConfigError(
                f"Preprocess.mean and std must have {count} values for {self.channels}, got {self.mean}, {self.std}."
            )
        if not 0 < self.crop <= 1:
            raise ConfigError(f"Preprocess.crop must be in (0, 1], got {self.crop}.")
        if any(not s > 0 for s in self.std):
            raise ConfigError(f"Preprocess.std must be positive, got {self.std}.")

    def digest(self) -> str:
        """sha256 of the contract, so that a mismatch between calibration, evaluation and device is seen."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """Where a model came from: checkpoint family, digest, and the size of the checkpoint as its authors count it."""

    family: str = "vitrim"
    name: str = ""
    sha256: str = ""
    params: int = 0


@dataclass(frozen=True, eq=False)
class Model:
    """A Vision Transformer in canonical form: spec, float32 weights, and the contract with its images.

    Args:
        spec: sizes.
        weights: every name of ``spec.shapes()``, float32 and finite.
        preprocess: how images become inputs.
        labels: class names, empty when unknown.
        origin: provenance.

    Raises:
        CheckpointError: a weight is missing, unexpected, of another shape, or not finite.
    """

    spec: VitSpec
    weights: Mapping[str, Array]
    preprocess: Preprocess
    labels: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        shapes = self.spec.shapes()
        for name in sorted(shapes.keys() ^ self.weights.keys()):
            what = "is missing" if name in shapes else "is not part of this architecture"
            raise CheckpointError(f"Tensor {name!r} {what}.")
        for name, shape in shapes.items():
            tensor = self.weights[name]
            if tensor.shape != shape:
                raise CheckpointError(f"Tensor {name!r} must have shape {shape}, got {tensor.shape}.")
            if tensor.dtype != np.float32:
                raise CheckpointError(f"Tensor {name!r} must be float32, got {tensor.dtype}.")
            if not np.isfinite(tensor).all():
                raise CheckpointError(
                    f"Tensor {name!r} must be finite, got NaN or infinity.",
                    hint="The checkpoint is damaged or diverged; use an earlier one.",
                )
        if self.labels and len(self.labels) != self.spec.num_classes:
            raise CheckpointError(f"labels must have {self.spec.num_classes} names, got {len(self.labels)}.")

    @property
    def params(self) -> int:
        """Parameters as the checkpoint's authors count them, or of the canonical form once the model was changed."""
        return self.origin.params or self.spec.params()

    def with_weights(self, spec: VitSpec, changed: Mapping[str, Array]) -> Model:
        """A new model of `spec`: weights of the same name are kept unless `changed` has them; the rest are dropped."""
        names = spec.shapes()
        merged = {n: np.asarray(changed.get(n, self.weights.get(n)), dtype=np.float32) for n in names}
        return replace(self, spec=spec, weights=merged, origin=replace(self.origin, params=0))
