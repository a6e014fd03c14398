"""The first stages of a run, each taken from the cache when it was finished before: images and pruning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import targets
from calibration import data
from calibration.fingerprint import Fingerprint, fingerprint, matched, read_fingerprint
from calibration.observe import ObservePlan, observe
from calibration.select import Selector, coarse_to_fine, features, k_centre, random
from compressor import checkpoint
from compressor.cache import Cache, key
from compressor.compiled import is_compiled
from compressor.errors import DataError
from compressor.prune import configure, prune
from compressor.recipe import Recipe
from compressor.types import Array, Model, Progress, Statistics
from compressor.vit import VisionTransformer, to_torch

__all__ = [
    "Images",
    "batches",
    "fingerprint_images",
    "load_images",
    "model_digest",
    "module_logits",
    "prune_stage",
    "torch_logits",
]

BATCH = 16
DEMO_CLASSES = 10  # of the embedded images
POOL = 8  # images a selector sees for each one it picks
SELECTORS: dict[str, Selector] = {"random": random, "k_centre": k_centre, "coarse_to_fine": coarse_to_fine}


@dataclass(frozen=True)
class Images:
    """Calibration images, and evaluation images with labels where there are any; no image is in both."""

    calibration: data.ImageSet
    evaluation: data.ImageSet | None
    labels: Array | None


def load_images(recipe: Recipe, model: Model, progress: Progress) -> Images:
    """The image sets a recipe names; ``demo`` data brings its own evaluation set for a model of as many classes.

    Raises:
        DataError: no images, labels that do not fit the model, images used for both calibration and evaluation, or a
            fingerprint of another model.
    """
    calibration = select_images(recipe, model, progress)
    fits = model.spec.num_classes == DEMO_CLASSES
    source = recipe.eval or ("demo:eval" if recipe.data == "demo" and fits else None)
    if source is None:
        return Images(calibration, None, None)
    evaluation = data.open_images(source)
    shared = set(calibration.content_hashes()) & set(evaluation.content_hashes())
    if shared:
        raise DataError(
            f"{source}: evaluation images must not be calibration images, got {len(shared)} in both sets.",
            hint="Calibrate on training images: an accuracy measured on calibration images proves nothing.",
        )
    labels = (
        data.match_labels(evaluation, model.labels, model.spec.num_classes) if evaluation.labels is not None else None
    )
    return Images(calibration, evaluation, labels)


def select_images(recipe: Recipe, model: Model, progress: Progress) -> data.ImageSet:
    """The calibration images: any, or the ones that the recipe's selector picks from a pool `POOL` times as large."""
    if recipe.select == "random" and recipe.match is None:
        return data.open_images(recipe.data, limit=recipe.calib_size, seed=recipe.seed)
    selector = SELECTORS[recipe.select]
    if recipe.match is not None:
        selector = matched(read_fingerprint(Path(recipe.match), model_digest(model)))
    pool = data.open_images(recipe.data, limit=POOL * recipe.calib_size, seed=recipe.seed)
    known = features(to_torch(model), batches(pool, model, progress, "select images"))
    count = min(recipe.calib_size, len(pool))
    return pool.subset(selector(known, count, np.random.default_rng(recipe.seed)).tolist())


def fingerprint_images(source: str, model: Model, components: int, seed: int, progress: Progress) -> Fingerprint:
    """What a device tells about the images in `source`: the mixture that describes their embeddings, no image and no feature.

    Raises:
        DataError: no images.
        ConfigError: more components than images.
    """
    known = features(to_torch(model), batches(data.open_images(source), model, progress, "fingerprint"))
    return fingerprint(known, model_digest(model), components, np.random.default_rng(seed))


def model_digest(model: Model) -> str:
    """sha256 of spec, image contract and weights: the identity of a model in the cache."""
    import hashlib

    digest = hashlib.sha256(json.dumps([asdict(model.spec), model.preprocess.digest()], sort_keys=True).encode())
    for name in sorted(model.weights):
        digest.update(np.ascontiguousarray(model.weights[name]).data)
    return digest.hexdigest()


def batches(images: data.ImageSet, model: Model, progress: Progress, stage: str) -> Iterator[Array]:
    """Preprocessed float32 batches (B, C, h, w), reporting progress by image."""
    yield from data.batches(images, model.preprocess, BATCH, partial(progress, stage))


def prune_stage(
    model: Model, images: data.ImageSet, recipe: Recipe, cache: Cache, progress: Progress
) -> tuple[Model, list[dict[str, Any]]]:
    """`model` with what the recipe removes removed, and the report of every block; the model itself when nothing is."""
    if not recipe.prunes:
        return model, []
    config = configure(recipe.pruner, prune_options(recipe))
    name = key("prune", model=model_digest(model), images=images.digest(), config=asdict(config), pruner=recipe.pruner)

    def make(folder: Path) -> None:
        passes = count(1)

        def stream() -> Iterator[Array]:
            return batches(images, model, progress, f"prune, pass {next(passes)}")

        def statistics(module: VisionTransformer, pixels: Iterable[Array]) -> Statistics:
            return observe(module, pixels, ObservePlan(moments=("fc2", "q", "k"), histograms=()))  # what CORP reads

        result = prune(model, stream, config, statistics)
        checkpoint.save(result.model, folder)
        (folder / "blocks.json").write_text(json.dumps([asdict(b) for b in result.blocks]))

    folder, reused = cache.fetch(name, make)
    if reused:
        progress("prune (reused)", 1, 1)
    small = checkpoint.load(str(folder))
    small = replace(small, preprocess=model.preprocess, labels=model.labels)
    return small, json.loads((folder / "blocks.json").read_text())


def prune_options(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says about pruning, by the names that the pruners' configurations use.

    Widths become multiples of what the kernels of every target like; CORP, as published, knows no such rounding.
    """
    names = (
        "mlp_ratio",
        "qk_ratio",
        "vo_ratio",
        "head_ratio",
        "drop_blocks",
        "target_macs",
        "target_params",
        "damping",
    )
    options = {n: getattr(recipe, n) for n in names}
    options["damping"] = None if recipe.damping == "auto" else recipe.damping  # each pruner knows its own default
    if recipe.pruner == "obs":
        options["importance"] = recipe.importance
        options["width_multiple"] = max(targets.get(t).CAPABILITIES.width_multiple for t in recipe.targets)
        chips = [targets.get(t).CAPABILITIES for t in recipe.targets if is_compiled(t)]
        # The row that sums the exponentials; what a chip pads decides, beside it a processor is there for comparison.
        options["value_rows"] = int(bool(chips) and all(form.softmax == "exp" for form in chips))
    return options


def torch_logits(model: Model, pixels: Array) -> Array:
    """(n, C, h, w) -> (n, classes) by the torch module: the reference every artifact is held against."""
    return module_logits(to_torch(model), pixels)


def module_logits(module: Callable[[Tensor], Tensor], pixels: Array, batch: int = 50) -> Array:
    """`torch_logits` of a module that was made before, for callers with many batches."""
    with torch.inference_mode():
        return np.concatenate(
            [module(torch.from_numpy(pixels[i : i + batch])).numpy() for i in range(0, len(pixels), batch)]
        )
