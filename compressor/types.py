"""Frozen records shared by every stage. Checks live in ``__post_init__``; there is no other logic than derived sizes.

Nothing here imports torch or a runtime, so the device install can read every record.
Shapes: B batch, N patches, P prefix tokens, T = P + N tokens, C embedding width, H heads, D head width, M MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from compressor.errors import ConfigError
from compressor.spec import MLP_KINDS, POOLS, Array, BlockSpec, MlpKind, Model, Origin, Pool, Preprocess, VitSpec

__all__ = [
    "BINS",
    "HIGH",
    "LOW",
    "MLP_KINDS",
    "PER_OCTAVE",
    "POOLS",
    "PRECISION_BITS",
    "WEIGHT_ONLY",
    "Array",
    "Artifact",
    "Availability",
    "Bits",
    "BlockSpec",
    "BuildOptions",
    "Capabilities",
    "Histogram",
    "MlpKind",
    "Model",
    "Moments",
    "OpRecord",
    "Origin",
    "Parity",
    "Pool",
    "Precision",
    "Preprocess",
    "Profile",
    "Progress",
    "QParams",
    "Quantization",
    "Session",
    "Statistics",
    "TensorSpec",
    "Verdict",
    "VitSpec",
    "Width",
    "largest",
    "latency_ms",
]

Precision = Literal["fp32", "fp16", "bf16", "w8a8", "w8a16", "w4a8", "w6a6", "w4a4", "w8a32", "w4a32", "fp8"]
Width = (
    int | Literal["e4m3"]
)  # bits of an integer, or the 8-bit float of 4 exponent and 3 mantissa bits, without infinity
Bits = tuple[Width, Width]  # of weights, of activations
Progress = Callable[[str, int, int], None]  # told (stage, done, total)

PRECISION_BITS: Mapping[Precision, Bits] = {
    "w8a8": (8, 8),
    "w8a16": (8, 16),
    "w4a8": (4, 8),
    "w6a6": (6, 6),
    "w4a4": (4, 4),
    "w8a32": (8, 32),
    "w4a32": (4, 32),
    "fp8": ("e4m3", "e4m3"),
}
WEIGHT_ONLY: tuple[Precision, ...] = ("w8a32", "w4a32")  # activations stay float32: asked for the size of the file


# --------------------------------------------------------------------------- statistics and quantization


def largest(width: Width) -> int:
    """The largest number of a signed grid before scaling.

    >>> largest(8), largest("e4m3")
    (127, 448)
    """
    return 448 if isinstance(width, str) else (1 << (width - 1)) - 1


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
            return {
                k: a[k] + b[k] if k in a and k in b else a.get(k, b.get(k)) for k in (*a, *(k for k in b if k not in a))
            }

        return Statistics(
            self.images + other.images,
            merge(self.moments, other.moments),
            merge(self.pair_energy, other.pair_energy),
            merge(self.histograms, other.histograms),
        )


@dataclass(frozen=True, eq=False)
class QParams:
    """Affine grid ``x ~ scale * (q - zero_point)``, q an integer or an 8-bit float; `axis` is the axis KEPT (None: one scale
    per tensor).

    With `group`, a matrix (O, I) has a scale for every `group` neighbours of a row; a row's last group may be shorter.
    """

    scale: Array  # (), (axis length,), or (O, ceil(I / group)); float32, positive
    zero_point: int
    bits: Width
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, str) and (self.zero_point or self.group is not None):
            raise ConfigError(
                f"QParams of {self.bits} must be symmetric without groups, got zero point {self.zero_point}, group {self.group}."
            )
        if self.group is not None and not (self.group > 0 and self.axis == 0 and np.ndim(self.scale) == 2):
            raise ConfigError(
                f"QParams.group must be positive, with axis 0 and scales (rows, groups), got {self.group}, "
                f"axis {self.axis} and {np.shape(self.scale)}."
            )
        if not (np.isfinite(self.scale).all() and (np.asarray(self.scale) > 0).all()):
            raise ConfigError("QParams.scale must be positive and finite.")

    @property
    def qmin(self) -> int:
        """Smallest number of the signed grid: -2^(bits-1), of an 8-bit float -448."""
        return -largest(self.bits) - (0 if isinstance(self.bits, str) else 1)

    @property
    def qmax(self) -> int:
        """Largest number of the signed grid: 2^(bits-1) - 1, of an 8-bit float 448."""
        return largest(self.bits)


@dataclass(frozen=True, eq=False)
class Quantization:
    """Integer grids of a model: per linear weight, and per activation site (the input of those linears).

    Weights are named as in `VitSpec.shapes` ("patch.weight", "blocks.0.q.weight", ...), sites as the taps of `compressor.vit`
    ("patch", "blocks.0.qkv", "blocks.0.proj", ...). A linear is executed in integers when its weight and its input site are
    both listed; with its weight alone, that is stored as integers and multiplied in float. With both "blocks.i.q" and
    "blocks.i.k" listed, q k^T of that block is executed in integers. Integers are
    ``clip(round_half_even(x / scale) + zero_point, qmin, qmax)``, computed in float32; 8-bit floats are the nearest ones, in
    the same way, and never beyond the largest.
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
    narrow: tuple[
        Precision, ...
    ] = ()  # no faster than w8a8 (in int8 on a coarser grid, or small files): only when asked for by name
    qkv: Literal["packed", "split"] = "split"
    attention: Literal["matmul", "fused"] = "matmul"
    equal_heads: bool = False  # pad q, k and v with zeros to one head width that fused attention kernels take
    norm: Literal["node", "conv"] = "node"
    gelu: Literal["node", "erf", "tanh"] = "node"
    patch: Literal["conv", "unshuffle", "halving", "columns"] = "conv"  # "columns": pixels (B, h, w, in)
    patch_stride: int = 2  # the largest one that "halving" and "columns" leave to the last convolution
    softmax: Literal["node", "exp"] = "node"
    logits: Literal["matrix", "map"] = "matrix"  # (B, classes), or (B, classes, 1, 1)
    qdq: Literal["none", "linear_inputs", "integer_ops", "all_tensors"] = "linear_inputs"
    zero_points: bool = True  # whether integer activations may have one at no cost
    int8_scores: bool = False  # whether q k^T in integers may be faster than in float: to be raced, not assumed
    batch: Literal["dynamic", "static"] = "dynamic"
    width_multiple: int = 8


@dataclass(frozen=True)
class Availability:
    """Whether a target can build here; if not, why, and the command that fixes it."""

    available: bool
    version: str = ""
    reason: str = ""
    fix: str = ""
    runs: bool = True  # False: what it builds runs on other hardware only


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
    """One executed node of a runtime: what it is, where it ran, in which precision, and for how long (0.0 unknown).

    A fused node whose products differ in precision names them in order: ``int8+fp32``.
    """

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
    chip: str = ""  # to build for, as the target's compiler calls it; empty: the target's own choice


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
    conditions: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the machine did meanwhile: compressor.device.conditions
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
