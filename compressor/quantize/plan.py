"""The plan: which linears run in integers, at how many bits, and with which scales.

Linear layers only. LayerNorm, softmax, GELU, residual additions and attention products stay in float: they are a few
per cent of the work and most of the damage.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import numpy as np

from compressor.errors import ConfigError, DataError
from compressor.quantize.grid import affine, symmetric
from compressor.quantize.search import Search, golden, histogram_error, row_error
from compressor.types import (
    PRECISION_BITS,
    WEIGHT_ONLY,
    Array,
    Capabilities,
    Histogram,
    Model,
    Precision,
    QParams,
    Quantization,
    Statistics,
    VitSpec,
    Width,
    largest,
)

__all__ = ["QuantizeConfig", "activation_grid", "for_target", "linears", "quantize", "weight_grid"]

GROUP = 32  # inputs that share a scale at w4a32: what the runtimes' own 4-bit kernels take


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Args:
        precision: bits of weights and activations.
        skip: patterns of weight names left in float, e.g. ``"head.weight"`` or ``"blocks.0.*"``.
        asymmetric: sites that get a zero point where it helps, by their last word: ``"fc2"`` is every ``blocks.i.fc2``.
        search: scale search; `golden`, or another of `compressor.quantize.search`.
    """

    precision: Precision = "w8a8"
    skip: tuple[str, ...] = ()
    asymmetric: tuple[str, ...] = ()
    search: Search = golden

    def __post_init__(self) -> None:
        if self.precision not in PRECISION_BITS:
            raise ConfigError(
                f"quantize: precision must be one of {', '.join(PRECISION_BITS)}, got {self.precision!r}.",
                hint="fp32 and bf16 are not quantized: skip this stage.",
            )

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in float."""
        return self.precision in WEIGHT_ONLY

    @property
    def group(self) -> int | None:
        """Inputs that share a scale of the weights; None: all of a row."""
        return GROUP if self.precision == "w4a32" else None

    def is_asymmetric(self, site: str) -> bool:
        """Whether `site` gets a zero point where it helps."""
        return site.rpartition(".")[2] in self.asymmetric

    def is_skipped(self, weight: str) -> bool:
        """Whether the weight of that name stays in float."""
        return any(fnmatch.fnmatch(weight, pattern) for pattern in self.skip)


def for_target(capabilities: Capabilities, precision: Precision) -> QuantizeConfig:
    """What a target runs at full speed: a zero point behind the GELU and at the pixels, where integers take one; 8-bit floats
    in matrix products only, not in convolutions.
    """
    if precision == "fp8":
        return QuantizeConfig(precision, skip=("patch.weight",) if capabilities.patch == "conv" else ())
    return QuantizeConfig(precision, asymmetric=("fc2", "patch") if capabilities.zero_points else ())


SITE = {"q": "qkv", "k": "qkv", "v": "qkv", "proj": "proj", "fc1": "fc1", "gate": "fc1", "fc2": "fc2"}


def linears(spec: VitSpec) -> dict[str, str]:
    """Weight name -> site of its input, for every linear layer, in execution order.

    >>> from compressor.types import BlockSpec
    >>> table = linears(VitSpec((8, 8), (4, 4), 3, 6, (BlockSpec(2, 3, 3, 12),), num_classes=5))
    >>> table["patch.weight"], table["blocks.0.k.weight"], table["head.weight"]
    ('patch', 'blocks.0.qkv', 'head')
    """
    table = {}
    for name in spec.shapes():
        stem, _, part = name.rpartition(".")
        if part != "weight" or "norm" in stem:
            continue
        prefix, _, leaf = stem.rpartition(".")
        table[name] = f"{prefix}.{SITE[leaf]}" if prefix else stem
    return table


def quantize(model: Model, stats: Statistics, config: QuantizeConfig) -> Quantization:
    """Grids for `model` from streamed statistics: per output channel, or group of it, for weights, per tensor else.

    Plain rounding to ranges from histograms, kept for reference and measured against by `bench/quantization.py`; what
    ``compress`` runs is `compressor.quantize.refine`.

    Args:
        model: the float model, pruned or not.
        stats: of this model's calibration pass; needs a histogram for each site whose activations are quantized.
        config: bits, exceptions, search.

    Raises:
        DataError: a site has no histogram.
    """
    weight_bits, activation_bits = PRECISION_BITS[config.precision]
    weights: dict[str, QParams] = {}
    activations: dict[str, QParams] = {}
    for name, site in linears(model.spec).items():
        if config.is_skipped(name):
            continue
        if not config.weight_only and site not in stats.histograms:
            raise DataError(f"quantize: the statistics must have a histogram of {site!r}, got none.")
        if not config.weight_only and site not in activations:
            asymmetric = config.is_asymmetric(site)
            activations[site] = activation_grid(
                stats.histograms[site], activation_bits, config.search, asymmetric=asymmetric
            )
        energy = _energy(stats, site)
        weights[name] = weight_grid(model.weights[name], weight_bits, config.search, energy, config.group)
    return Quantization(weights, activations, config.precision)


def activation_grid(histogram: Histogram, bits: Width, search: Search = golden, *, asymmetric: bool = False) -> QParams:
    """The per-tensor grid with the least expected squared error; with a zero point only where that is better.

    For `quantize` alone: ``compress`` chooses these grids on sampled inputs, see `compressor.quantize.ranges`.

    An 8-bit float represents the largest value seen: its error is relative, so there is nothing to gain by clipping.
    The asymmetric grid keeps every negative value, which suits what follows a GELU, and searches the positive end.
    """
    if not histogram.amax > 0:
        return symmetric(0.0, bits)
    if isinstance(bits, str):
        return symmetric(histogram.amax, bits)
    steps = largest(bits)
    even = search(histogram_error(histogram, bits), np.asarray([histogram.amax / steps]))
    if asymmetric:
        low, levels = histogram.negative, 2**bits - 1
        skewed = search(histogram_error(histogram, bits, low), np.asarray([(histogram.amax - low) / levels]))
        if skewed.error[0] < even.error[0]:
            return affine(low, low + skewed.scale[0] * levels, bits)
    return symmetric(even.scale[0] * steps, bits)


def weight_grid(
    weight: Array, bits: Width, search: Search = golden, energy: Array | None = None, group: int | None = None
) -> QParams:
    """Symmetric grids, one per output channel of `weight` (O, ...), with the least error under input `energy` (I,).

    With `group`, one per output channel and `group` neighbouring inputs. 8-bit floats represent each channel's largest weight.
    """
    if isinstance(bits, str):
        return symmetric(np.abs(weight.reshape(len(weight), -1)).max(axis=1), bits, axis=0)
    rows, steps = weight.reshape(len(weight), -1), largest(bits)
    width = group or rows.shape[1]
    reach = []
    for start in range(0, rows.shape[1], width):
        part = slice(start, start + width)
        amax = np.abs(rows[:, part]).max(axis=1).astype(np.float64)
        objective = row_error(rows[:, part], bits, None if energy is None else energy[part])
        found = search(objective, np.where(amax > 0, amax, 1.0) / steps)
        reach.append(np.where(amax > 0, found.scale * steps, 0.0))
    return symmetric(reach[0] if group is None else np.stack(reach, axis=1), bits, axis=0, group=group)


def _energy(stats: Statistics, site: str) -> Array | None:
    """Mean square of each input channel, (I,), where the pass kept the moments of `site`."""
    if site == "patch" or site not in stats.moments:
        return None
    second = np.asarray(stats.moments[site].second)
    return np.diagonal(second, axis1=-2, axis2=-1).reshape(-1)
