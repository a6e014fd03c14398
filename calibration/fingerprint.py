"""What a device tells about its images without sending any: a Gaussian mixture over their embeddings.

The file holds the mixture's parameters and nothing else, neither an image nor a feature of one. `matched` picks images of
a public pool that are distributed like the device's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.select import Features, Selector, checked, shares
from compressor.errors import ConfigError, DataError
from compressor.types import Array

__all__ = ["Fingerprint", "as_json", "fingerprint", "matched", "read_fingerprint"]

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A diagonal Gaussian mixture over embeddings of one model; `model` is its digest, since embeddings are its own."""

    weights: Array  # (k,) sum to 1
    means: Array  # (k, C)
    variances: Array  # (k, C)
    model: str
    images: int


def matched(target: Fingerprint) -> Selector:
    """A selector of images that are distributed like those behind `target`.

    Each component gets a share of the budget in proportion to its weight; points are drawn from it and each takes the
    nearest image, in units of the component's spread, that is not yet taken.

    Source: TAP-ViTs, arXiv 2601.02437, which picks public data by a device's mixture parameters. Deviation: drawing points
    keeps the spread of a component, where picking its most likely images would keep only its centre.
    """
    return partial(_match, target)


def _match(target: Fingerprint, pool: Features, count: int, rng: np.random.Generator) -> Array:
    if pool.embedding.shape[1] != target.means.shape[1]:
        raise DataError(
            f"fingerprint: embeddings must have width {pool.embedding.shape[1]} of this model, got {target.means.shape[1]}.",
            hint="Write the fingerprint with the model that is being compressed.",
        )
    free = np.ones(len(pool), dtype=bool)
    for component, quota in enumerate(shares(target.weights, checked(pool, count))):
        deviation = np.sqrt(target.variances[component])
        for _ in range(quota):
            point = rng.normal(target.means[component], deviation)
            distance = np.square((pool.embedding - point) / deviation).sum(1)
            free[np.where(free, distance, np.inf).argmin()] = False
    return np.flatnonzero(~free)


def fingerprint(pool: Features, model: str, components: int, rng: np.random.Generator) -> Fingerprint:
    """The mixture of `components` Gaussians that describes the pool best.

    Args:
        pool: features of the device's images, two at least.
        model: digest of the model that made them.
        components: k; 1 to the number of images.
        rng: starts the fit.

    Raises:
        DataError: fewer than two images.
        ConfigError: more components than images.
    """
    from sklearn.mixture import GaussianMixture

    if len(pool) < 2:
        raise DataError(
            f"fingerprint: a spread must be that of at least two images, got {len(pool)}.",
            hint="Give a folder with more images of the device.",
        )
    if not 1 <= components <= len(pool):
        raise ConfigError(f"fingerprint: components must be 1 to {len(pool)}, the number of images, got {components}.")
    seed = int(rng.integers(2**31))
    fit = GaussianMixture(components, covariance_type="diag", reg_covar=1e-4, random_state=seed).fit(pool.embedding)
    return Fingerprint(fit.weights_, fit.means_, fit.covariances_, model, len(pool))


def as_json(mixture: Fingerprint) -> str:
    """The text of a fingerprint file: the mixture's parameters, rounded to float32."""

    def plain(values: Array) -> Any:
        return np.asarray(values, dtype=np.float32).astype(float).tolist()

    content = {
        "schema": SCHEMA,
        "model": mixture.model,
        "images": mixture.images,
        "weights": plain(mixture.weights),
        "means": plain(mixture.means),
        "variances": plain(mixture.variances),
    }
    return json.dumps(content)


def read_fingerprint(path: Path, model: str) -> Fingerprint:
    """The mixture of a file that holds the text of `as_json`, made with the same model.

    Raises:
        DataError: not a fingerprint, damaged, or of another model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weights, means, variances = (
            np.asarray(content[k], dtype=np.float64) for k in ("weights", "means", "variances")
        )
        origin, images = str(content["model"]), int(content["images"])
    except OSError as error:
        raise DataError(f"{path}: must be a fingerprint file, got {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path}: must be a fingerprint file, got something else ({error}).", hint="`vitrim fingerprint` makes one."
        ) from error
    shapes = weights.ndim == 1 and means.ndim == 2 and means.shape == variances.shape and len(means) == len(weights) > 0
    values = shapes and all(np.isfinite(v).all() for v in (weights, means, variances))
    shares = values and ((weights >= 0) & (weights <= 1)).all() and weights.any()
    if content.get("schema") != SCHEMA or not shares or not (variances > 0).all():
        raise DataError(f"{path}: must be a fingerprint of schema {SCHEMA} with positive variances, got a damaged one.")
    if origin != model:
        raise DataError(
            f"{path}: must be made with this model ({model[:12]}), got one of model {origin[:12]}.",
            hint="Embeddings of different models cannot be compared: run `vitrim fingerprint` with this model.",
        )
    return Fingerprint(weights / weights.sum(), means, variances, origin, images)
