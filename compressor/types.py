"""Frozen records shared by every stage. Checks live in ``__post_init__``; there is no other logic than derived sizes.

Nothing here imports torch or a runtime, so the device install can read every record.
Shapes: B batch, N patches, P prefix tokens, T = P + N tokens, C embedding width, H heads, D head width, M MLP width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CheckpointError, ConfigError

Array = NDArray[Any]
MlpKind = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Pool = Literal["token", "avg", "token_dist", "token_avg"]
Precision = Literal["fp32", "bf16", "w8a8", "w8a16", "w4a8", "w6a6"]
Bits = tuple[int, int]  # (weight bits, activation bits)

MLP_KINDS: tuple[MlpKind, ...] = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLS: tuple[Pool, ...] = ("token", "avg", "token_dist", "token_avg")
PRECISION_BITS: Mapping[Precision, Bits] = {"w8a8": (8, 8), "w8a16": (8, 16), "w4a8": (4, 8), "w6a6": (6, 6)}


# --------------------------------------------------------------------------- the model


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
    side by side), ``token_avg`` (token 0 and the patch mean side by side). `num_classes` 0 means the pooled feature is the output.
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
        if not self.blocks:
            raise ConfigError("VitSpec.blocks must hold at least one block, got none.")
        if self.pool not in POOLS:
            raise ConfigError(f"VitSpec.pool must be one of {', '.join(POOLS)}, got {self.pool!r}.")
        needed = {"token": 1, "avg": 0, "token_dist": 2, "token_avg": 1}[self.pool]
        if self.prefix_tokens < needed:
            raise ConfigError(f"VitSpec.pool {self.pool!r} must have {needed} prefix tokens, got {self.prefix_tokens}.")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or size < patch:
                raise ConfigError(f"VitSpec.image_size must be at least one patch, got {self.image_size} / {self.patch_size}.")

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

    `resize` ``shorter``: the shorter side becomes ``floor(size / crop)``, then a centre crop; ``exact``: both sides are set
    to `size`, no crop. `mean` and `std` are per channel on the 0..1 scale.
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
            raise ConfigError(f"Preprocess.mean and std must have {count} values for {self.channels}, got {self.mean}, {self.std}.")
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
                    f"Tensor {name!r} must be finite, got NaN or infinity.", hint="The checkpoint is damaged or diverged; use an earlier one."
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


# --------------------------------------------------------------------------- statistics and quantization


@dataclass(frozen=True, eq=False)
class Moments:
    """Mergeable first and second moments of vectors, float64; ``a + b`` is one pass over both.

    Leading axes (heads) are independent: ``sum`` (..., D), ``outer`` (..., D, D) = sum of x x^T. Torch or NumPy arrays.
    """

    count: int
    sum: Any  # (..., D) float64
    outer: Any  # (..., D, D) float64

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    @property
    def mean(self) -> Any:
        """(..., D)."""
        return self.sum / self.count

    @property
    def second(self) -> Any:
        """Uncentred second moment E[x x^T], (..., D, D)."""
        return self.outer / self.count

    @property
    def covariance(self) -> Any:
        """Centred, biased covariance, (..., D, D)."""
        mean = self.mean
        return self.second - mean[..., :, None] * mean[..., None, :]


LOW, HIGH, PER_OCTAVE = -24, 16, 16  # of Histogram: powers of two it spans, and bins per octave
BINS = (HIGH - LOW) * PER_OCTAVE


@dataclass(frozen=True, eq=False)
class Histogram:
    """Mergeable histogram of |x| on fixed logarithmic bins, so that no range has to be known in advance.

    Bin k covers ``2 ** (LOW + k / PER_OCTAVE)`` to ``2 ** (LOW + (k + 1) / PER_OCTAVE)``; the first bin also holds everything
    smaller (zero too), the last everything larger.
    """

    counts: Array  # (BINS,) int64
    amax: float
    negative: float = 0.0  # most negative value seen

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts, max(self.amax, other.amax), min(self.negative, other.negative))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one streamed pass over the calibration images leaves behind; ``a + b`` is one pass over both."""

    images: int
    moments: Mapping[str, Moments]  # by site of compressor.vit; heads are leading axes
    pair_energy: Mapping[str, Any]  # "blocks.i" -> (H, D) sum over tokens of q_j^2 k_j^2, CORP's Q/K score
    histograms: Mapping[str, Histogram]  # by site that feeds a quantized linear

    def __add__(self, other: Statistics) -> Statistics:
        def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
            return {k: a[k] + b[k] if k in a and k in b else a.get(k, b.get(k)) for k in (*a, *(k for k in b if k not in a))}

        return Statistics(
            self.images + other.images,
            merge(self.moments, other.moments),
            merge(self.pair_energy, other.pair_energy),
            merge(self.histograms, other.histograms),
        )


@dataclass(frozen=True, eq=False)
class QParams:
    """Affine integer grid ``x ~ scale * (q - zero_point)``; `axis` is the axis KEPT (None: one scale per tensor)."""

    scale: Array  # () or (axis length,) float32, positive
    zero_point: int
    bits: int
    axis: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale).all() and (np.asarray(self.scale) > 0).all()):
            raise ConfigError("QParams.scale must be positive and finite.")

    @property
    def qmin(self) -> int:
        """Smallest integer of the signed grid, -2^(bits-1)."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest integer of the signed grid, 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True, eq=False)
class Quantization:
    """Integer grids of a model: per linear weight, and per activation site (the input of those linears).

    Weights are named as in `VitSpec.shapes` ("patch.weight", "blocks.0.q.weight", ...), sites as the taps of `compressor.vit`
    ("patch", "blocks.0.qkv", "blocks.0.proj", ...). A linear is executed in integers when its weight and its input site are
    both listed. Integers are ``clip(round_half_even(x / scale) + zero_point, qmin, qmax)``, computed in float32.
    """

    weights: Mapping[str, QParams]
    activations: Mapping[str, QParams]
    precision: Precision = "w8a8"


# --------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Capabilities:
    """What a target wants from `lower`: layout, opset, operator forms, QDQ style. No target edits a graph afterwards."""

    layout: Literal["tokens", "conv"]
    opset: int
    precisions: tuple[Precision, ...]
    qkv: Literal["packed", "split"] = "split"
    attention: Literal["matmul", "fused"] = "matmul"
    norm: Literal["node", "conv"] = "node"
    gelu: Literal["node", "erf", "tanh"] = "node"
    patch: Literal["conv", "unshuffle"] = "conv"
    softmax: Literal["node", "exp_conv"] = "node"
    qdq: Literal["none", "linear_inputs", "integer_ops", "all_tensors"] = "linear_inputs"
    batch: Literal["dynamic", "static"] = "dynamic"
    width_multiple: int = 8


@dataclass(frozen=True)
class Availability:
    """Whether a target can run here; if not, why, and the command that fixes it."""

    available: bool
    version: str = ""
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an artifact's input or output; -1 marks the free batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Artifact:
    """A built file of one target. `path` is the main file; `settings` are what `open` needs beside it."""

    target: str
    path: Path
    sha256: str
    size_bytes: int
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()  # every file of the artifact, main file included


@dataclass(frozen=True)
class OpRecord:
    """One executed node of a runtime: what it is, where it ran, in which precision, and for how long (0.0 unknown)."""

    name: str
    type: str
    placement: str
    precision: str
    time_ms: float


@runtime_checkable
class Session(Protocol):
    """An opened artifact. Timing, parity and gating never appear in a target file."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name."""
        ...

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Per-node table of one profiled execution; empty when the runtime offers none."""
        ...


@dataclass(frozen=True)
class BuildOptions:
    """What a target's `build` needs beside the graph."""

    out_dir: Path
    precision: Precision = "fp32"
    name: str = "model"
    quantizer: Literal["vitrim", "nncf"] = "vitrim"
    calibration: tuple[Array, ...] = ()  # preprocessed batches (B, C, h, w) for a runtime's own quantizer


# --------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Parity:
    """How close a candidate's outputs are to the reference's on the same inputs."""

    max_abs: float
    cosine: float
    agreement: float  # share of inputs with the same top-1 class
    count: int


@dataclass(frozen=True)
class Profile:
    """Latency distribution of one session; raw samples are kept, nothing is discarded without a count."""

    target: str
    samples_ns: tuple[int, ...]
    warmup: int
    threads: int
    batch: int
    load_ms: float
    first_run_ms: float
    peak_rss_bytes: int
    device: Mapping[str, Any]
    ops: tuple[OpRecord, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)  # what the machine did meanwhile: compressor.device.conditions
    yardstick_ns: tuple[int, ...] = ()  # a fixed piece of work, to tell later whether the machine has drifted

    def latency_ms(self) -> dict[str, float]:
        """min, p50, p90, p99 and mean in milliseconds."""
        return latency_ms(self.samples_ns)


def latency_ms(samples_ns: tuple[int, ...]) -> dict[str, float]:
    """min, p50, p90, p99 and mean of nanosecond samples, in milliseconds.

    >>> latency_ms((1_000_000, 3_000_000))["p50"]
    2.0
    """
    ms = np.asarray(samples_ns, dtype=np.float64) / 1e6
    p50, p90, p99 = (float(np.percentile(ms, p)) for p in (50, 90, 99))
    return {"min": float(ms.min()), "p50": p50, "p90": p90, "p99": p99, "mean": float(ms.mean())}


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check, with the sentence a person reads."""

    verdict: Literal["pass", "fail", "inconclusive"]
    sentence: str
