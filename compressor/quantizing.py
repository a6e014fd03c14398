"""The quantization stage of a run: integers that fit the target, kept in float where the answers would change too often."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration import data
from compressor import checkpoint
from compressor.cache import Cache, key
from compressor.errors import ConfigError
from compressor.quantize import QuantizeConfig, simulate
from compressor.quantize.importance import Importance, token_importance
from compressor.quantize.refine import LayerReport, RefineConfig, Refined, refine
from compressor.quantize.sensitivity import Sensitivity, sensitivity
from compressor.stages import batches, model_digest, module_logits, torch_logits
from compressor.types import Array, Model, Precision, Progress, QParams, Quantization
from compressor.vit import to_torch

__all__ = ["Quantized", "Quantizer"]

IMPORTANCE_IMAGES = 32  # a table of one number per token and layer needs no more


@dataclass(frozen=True, eq=False)
class Quantized:
    """A model on integer grids, what each site costs, and the sites that were therefore left in float."""

    refined: Refined
    agreement: float  # simulated, percent of calibration images with the class of the float model
    sensitivity: tuple[Sensitivity, ...]
    kept_float: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Quantizer:
    """One model's quantization, at any configuration.

    Args:
        model: the float model, pruned or not.
        images: calibration images.
        pixels: (n, C, h, w), some of them, on which agreement is counted.
        cache: finished stages.
        progress: called with (stage, done, total).
    """

    model: Model
    images: data.ImageSet
    pixels: Array
    cache: Cache
    progress: Progress

    def quantize(self, config: QuantizeConfig, min_agreement: float) -> Quantized:
        """`model` on the grids of `config`, with as many sites in float as it takes to keep `min_agreement` percent.

        Sites return to float in order of divergence caused per multiply-add saved, in doubling numbers, until enough
        classes stay or half of the sites are float; then the target decides whether it is worth anything.

        Raises:
            ConfigError: the model has one class, which no change of its output changes.
        """
        if self.model.spec.num_classes == 1:
            raise ConfigError(
                "quantize: a model must have at least two classes, for changes to be counted, got one.",
                hint="Use --precision fp32.",
            )
        refined = self.refine(config)
        agreement = self.agreement(refined)
        table = sensitivity(self.model, config, self.pixels)
        ranked = [s.site for s in sorted(table, key=lambda s: s.divergence / s.macs, reverse=True)]
        count = 1
        while agreement < min_agreement and count <= len(ranked) // 2:
            refined = self.refine(replace(config, skip=(*config.skip, *_weights(table, ranked[:count]))))
            agreement = self.agreement(refined)
            count *= 2
        kept = tuple(sorted(ranked[: count // 2])) if count > 1 else ()
        return Quantized(refined, agreement, table, kept)

    def refine(self, config: QuantizeConfig) -> Refined:
        """The sequential pass of `compressor.quantize.refine`, from the cache when it was finished before."""
        model = self.model
        digests = {"model": model_digest(model), "images": self.images.digest()}
        name = key("quantize", **digests, config={**asdict(config), "search": config.search.__name__})
        stage = f"calibrate {config.precision}"

        def make(folder: Path) -> None:
            pixels = batches(self.images, model, self.progress, f"{stage}, images")
            layers = partial(self.progress, f"{stage}, layers")
            write(refine(model, pixels, RefineConfig(config), self.importance, layers), folder)

        folder, reused = self.cache.fetch(name, make)
        if reused:
            self.progress(f"{stage} (reused)", 1, 1)
        return read(folder, config.precision)

    @cached_property
    def importance(self) -> Importance:
        """Of every token, for every configuration alike."""
        few = self.images.subset(range(min(IMPORTANCE_IMAGES, len(self.images))))
        return token_importance(to_torch(self.model), batches(few, self.model, self.progress, "calibrate, importance"))

    @cached_property
    def classes(self) -> Array:
        """(n,) of `pixels`, by the float model."""
        found: Array = torch_logits(self.model, self.pixels).argmax(1)
        return found

    def agreement(self, refined: Refined) -> float:
        """Percent of `pixels` that get the float model's class in simulation."""
        coarse = module_logits(simulate(refined.model, refined.quantization), self.pixels)
        return 100 * float((coarse.argmax(1) == self.classes).mean())


def _weights(table: tuple[Sensitivity, ...], sites: list[str]) -> list[str]:
    return [weight for s in table if s.site in sites for weight in s.weights]


# --------------------------------------------------------------------------- files


def write(refined: Refined, folder: Path) -> None:
    """The model, its grids (scales as arrays, the rest as one JSON entry) and the report of every layer."""
    checkpoint.save(refined.model, folder)
    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    tables: Mapping[str, Mapping[str, QParams]] = {
        "weights": refined.quantization.weights,
        "activations": refined.quantization.activations,
        "scores": refined.scores,
    }
    for kind, table in tables.items():
        for name, q in table.items():
            arrays[f"{kind}/{name}"] = np.asarray(q.scale, np.float32)
            facts[f"{kind}/{name}"] = [q.zero_point, q.bits, q.axis, q.group]
    np.savez(folder / "quantization.npz", facts=np.array(json.dumps(facts)), **arrays)
    (folder / "layers.json").write_text(json.dumps([asdict(layer) for layer in refined.layers]))


def read(folder: Path, precision: Precision) -> Refined:
    """What `write` wrote."""
    tables: dict[str, dict[str, QParams]] = {"weights": {}, "activations": {}, "scores": {}}
    with np.load(folder / "quantization.npz", allow_pickle=False) as stored:
        for entry, (zero, bits, axis, group) in json.loads(str(stored["facts"])).items():
            kind, _, name = entry.partition("/")
            tables[kind][name] = QParams(stored[entry], zero, bits, axis, group)
    layers = tuple(LayerReport(**layer) for layer in json.loads((folder / "layers.json").read_text()))
    grids = Quantization(tables["weights"], tables["activations"], precision)
    return Refined(checkpoint.load(str(folder)), grids, layers, tables["scores"])
