"""What quantizing one site alone does to the prediction: the table that says where integers hurt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compressor.linalg import require_finite
from compressor.quantize.equalize import SITES, equalize
from compressor.quantize.grid import fake_quant
from compressor.quantize.plan import QuantizeConfig, linears, weight_grid
from compressor.quantize.ranges import fit_grid
from compressor.quantize.simulate import fake_quant_tap
from compressor.types import PRECISION_BITS, Array, Model
from compressor.vit import Tap, to_torch

__all__ = ["Sensitivity", "sensitivity"]

BUDGET = 1e12  # multiply-adds of the whole table; few images are enough for an order
FEWEST, MOST = 4, 64
ROWS = 1024  # of a site's inputs, on which its grid is chosen


@dataclass(frozen=True)
class Sensitivity:
    """One site: the weights that read it, their multiply-adds per image, and the divergence (nats) integers cause there."""

    site: str
    weights: tuple[str, ...]
    macs: int
    divergence: float


def sensitivity(model: Model, config: QuantizeConfig, pixels: Array) -> tuple[Sensitivity, ...]:
    """Mean KL divergence from the float prediction when one site alone is quantized, for every site of `config`.

    The network is run from the block of the site onwards, so the table costs half a forward pass per site and image.

    Args:
        model: the float model.
        config: bits, exceptions, zero points.
        pixels: (n, C, h, w) calibration inputs; the first few are used.

    Raises:
        DataError: a prediction is not finite.
    """
    readers: dict[str, list[str]] = {}
    for name, site in linears(model.spec).items():
        if not config.is_skipped(name):
            readers.setdefault(site, []).append(name)
    count = int(np.clip(BUDGET // max(model.spec.macs() * len(readers) / 2, 1), FEWEST, MOST))
    run = _Run(model, torch.from_numpy(pixels[:count]))
    return tuple(
        Sensitivity(site, tuple(names), _macs(model, site, names), run.divergence(site, names, config))
        for site, names in readers.items()
    )


def _macs(model: Model, site: str, names: list[str]) -> int:
    rows = 1 if site == "head" else model.spec.tokens
    return sum(rows * model.weights[name].size for name in names)


class _Run:
    """A float network with the stream before every block kept, and some inputs of every site, for a few images."""

    def __init__(self, model: Model, pixels: Tensor) -> None:
        self.model, self.module, self.pixels = model, to_torch(model), pixels
        self.rows: dict[str, Array] = {}
        with torch.inference_mode():
            self.streams = [self.module.embed(pixels, self._keep)]
            for i, block in enumerate(self.module.blocks):
                self.streams.append(block(self.streams[-1], self._keep, f"blocks.{i}"))
            self.expected = self.module.classify(self.streams[-1], self._keep).double().log_softmax(1)
        require_finite(self.expected)

    def divergence(self, site: str, names: list[str], config: QuantizeConfig) -> float:
        """Mean KL from the float prediction with `site` and the weights `names` on their grids."""
        weight_bits, activation_bits = PRECISION_BITS[config.precision]
        exact = {n: self.model.weights[n] for n in names}
        stacked = np.concatenate([w.reshape(len(w), -1) for w in exact.values()])
        folds = site.rpartition(".")[2] in SITES
        factor = equalize(self.rows[site], stacked, site, config).factor if folds else np.float32(1)
        grids = {}
        if not config.weight_only:
            rows, weight, asymmetric = self.rows[site] / factor, stacked * factor, config.is_asymmetric(site)
            grids[site] = fit_grid(rows, activation_bits, weight, config.search, asymmetric=asymmetric)
        on = partial(weight_grid, bits=weight_bits, search=config.search, group=config.group)
        self._put({n: fake_quant(w * factor, on(w * factor)) / factor for n, w in exact.items()})
        inner, by = fake_quant_tap(grids), torch.from_numpy(np.asarray(factor))
        with torch.inference_mode():
            logits = self._forward(site, lambda at, x: inner(at, x / by) * by if at == site else x)
        self._put(exact)
        got = logits.double().log_softmax(1)
        require_finite(got)
        return max(float((self.expected.exp() * (self.expected - got)).sum(1).mean()), 0.0)

    def _forward(self, site: str, tap: Tap) -> Tensor:
        """Logits, from the first place that `site` changes."""
        blocks = len(self.streams) - 1
        start = int(site.split(".")[1]) if site.startswith("blocks.") else 0 if site == "patch" else blocks
        stream = self.module.embed(self.pixels, tap) if site == "patch" else self.streams[start]
        for i in range(start, blocks):
            stream = self.module.blocks[i](stream, tap, f"blocks.{i}")
        return self.module.classify(stream, tap)

    def _put(self, weights: Mapping[str, Array]) -> None:
        for name, values in weights.items():
            self.module.get_parameter(name).data = torch.from_numpy(values)

    def _keep(self, site: str, x: Tensor) -> Tensor:
        rows = x
        if site == "patch":
            size = self.model.spec.patch_size
            rows = torch.nn.functional.unfold(x, size, stride=size).transpose(1, 2)
        rows = rows.flatten(0, -2)
        self.rows[site] = rows[:: max(1, len(rows) // ROWS)].numpy().copy()  # a view would keep every row alive
        return x
