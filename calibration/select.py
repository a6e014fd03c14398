"""Which images to calibrate on: a few that stand for many, or few that look like the images of a device.

A selector maps (features of a pool, how many, random generator) to sorted indices into the pool. Features come from one
streamed forward pass; nothing else of an image is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.types import Array
from compressor.vit import VisionTransformer

__all__ = ["Features", "Selector", "checked", "coarse_to_fine", "features", "k_centre", "random", "shares"]

PURE_SHARE = 0.9  # of the pool survives the coarse stage
LINEAR_INPUTS = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True, eq=False)
class Features:
    """What is known of each image of a pool of n.

    `embedding` is what the classifier reads, (n, C); `activity` the mean, standard deviation, largest magnitude and mean of
    the largest 1 % of each linear layer's input, (n, 4 * sites).
    """

    embedding: Array
    activity: Array

    def __len__(self) -> int:
        return len(self.embedding)


Selector = Callable[[Features, int, np.random.Generator], Array]


def features(module: VisionTransformer, batches: Iterable[Array]) -> Features:
    """Features of every image, from one forward pass that holds one batch at a time.

    Args:
        module: the network being compressed.
        batches: float32 arrays (B, C, h, w).

    Raises:
        DataError: no image.
    """
    embeddings: list[Array] = []
    activities: list[Array] = []
    seen: list[Tensor] = []

    def tap(site: str, x: Tensor) -> Tensor:
        if site == "head":
            embeddings.append(x.numpy().copy())  # a view would keep every token alive
        elif site.rpartition(".")[2] in LINEAR_INPUTS:
            flat = x.flatten(1)
            top = flat.abs().topk(max(1, flat.shape[1] // 100), dim=1).values
            seen.append(torch.stack([flat.mean(1), flat.std(1), top[:, 0], top.mean(1)], dim=1))
        return x

    with torch.inference_mode():
        for batch in batches:
            seen.clear()
            module(torch.from_numpy(batch), tap)
            activities.append(torch.cat(seen, dim=1).numpy())
    if not embeddings:
        raise DataError("Selection must have at least one image to choose from, got none.")
    return Features(np.concatenate(embeddings), np.concatenate(activities))


# --------------------------------------------------------------------------- selectors


def random(pool: Features, count: int, rng: np.random.Generator) -> Array:
    """Any `count` images."""
    return np.sort(rng.choice(len(pool), checked(pool, count), replace=False))


def k_centre(pool: Features, count: int, rng: np.random.Generator) -> Array:
    """Images such that no image of the pool is far from a chosen one: farthest-first traversal.

    Source: Gonzalez 1985; within a factor 2 of the smallest possible radius.
    """
    x = _standardised(pool.embedding)
    chosen = [int(rng.integers(len(x)))]
    distance = np.square(x - x[chosen[0]]).sum(1)
    while len(chosen) < checked(pool, count):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.square(x - x[chosen[-1]]).sum(1))
    return np.sort(np.asarray(chosen))


def coarse_to_fine(pool: Features, count: int, rng: np.random.Generator) -> Array:
    """Images of statistically pure clusters, then nearest to the centres of clusters of meaning.

    Coarse: activation statistics are clustered and the tenth of the pool farthest from its centre is dropped. Fine:
    embeddings of the rest are clustered, each cluster gets a share of the budget in proportion to its size, and gives the
    images nearest to its centre.

    Source: progressive calibration of TAPTQ, arXiv 2602.01741. Its statistical-purity feature is not published in detail:
    mean, standard deviation, maximum and mean of the top 1 % of each quantized input stand for it.
    """
    checked(pool, count)
    activity = _standardised(pool.activity)
    _, far = _clusters(activity, max(2, int(np.sqrt(len(pool) / 2))), rng)
    keep = max(count, int(np.ceil(PURE_SHARE * len(pool))))
    pure = np.sort(np.argsort(far, kind="stable")[:keep])
    label, far = _clusters(_standardised(pool.embedding[pure]), max(1, count // 2), rng)
    quota = shares(np.bincount(label), count)
    picked = [
        pure[np.flatnonzero(label == k)[np.argsort(far[label == k], kind="stable")[:n]]] for k, n in enumerate(quota)
    ]
    return np.sort(np.concatenate(picked))


# --------------------------------------------------------------------------- parts


def checked(pool: Features, count: int) -> int:
    """`count`, when the pool has that many images.

    Raises:
        ConfigError: it has not.
    """
    if not 1 <= count <= len(pool):
        raise ConfigError(f"calib_size must be 1 to {len(pool)}, the number of images to choose from, got {count}.")
    return count


def _standardised(x: Array) -> Array:
    """Columns with mean 0 and variance 1; constant columns become 0."""
    deviation = x.std(0)
    return np.asarray((x - x.mean(0)) / np.where(deviation > 1e-12, deviation, np.inf))


def _clusters(x: Array, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """k-means: label of each row, and its distance to its centre."""
    from sklearn.cluster import KMeans

    fit = KMeans(min(count, len(np.unique(x, axis=0))), n_init=4, random_state=int(rng.integers(2**31))).fit(x)
    return fit.labels_, np.linalg.norm(x - fit.cluster_centers_[fit.labels_], axis=1)


def shares(sizes: Array, count: int) -> Array:
    """`count` split in proportion to `sizes`, by largest remainder; never more than a size that is a count of images.

    >>> shares(np.array([5, 3, 2]), 4)
    array([2, 1, 1])
    """
    exact = count * sizes / sizes.sum()
    whole = np.floor(exact).astype(int)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: count - whole.sum()]] += 1
    return np.asarray(whole)
