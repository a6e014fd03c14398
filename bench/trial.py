"""What the benchmarks share: a trained model with its images, the distance of other answers from its own, and turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calibration import data
from compressor import checkpoint
from compressor.intervals import proportion_interval
from compressor.stages import torch_logits
from compressor.types import Array, Model

__all__ = ["BATCH", "Trial", "arguments", "divergence", "in_batches", "open_trial", "score", "turns"]

BATCH = 50
WARMUP = 3


@dataclass(frozen=True, eq=False)
class Trial:
    """A trained model, its images as it reads them, and its own answers: what every row is held against."""

    model: Model
    calibration: Array  # (n, C, h, w)
    evaluation: Array  # (m, C, h, w)
    labels: Array | None  # (m,)
    reference: Array  # (m, classes) float logits

    def batches(self) -> list[Array]:
        """The calibration images."""
        return [self.calibration[i : i + BATCH] for i in range(0, len(self.calibration), BATCH)]


def arguments(doc: str | None, images: int) -> argparse.ArgumentParser:
    """``MODEL --data --eval --images``, as `open_trial` wants them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--eval", default="demo:eval")
    parser.add_argument("--images", type=int, default=images)
    return parser


def open_trial(options: argparse.Namespace) -> Trial:
    """What `arguments` named; calibration images are refused among the evaluation images."""
    model = checkpoint.load(options.model)
    images, unseen = data.open_images(options.data, limit=options.images), data.open_images(options.eval)
    if set(images.content_hashes()) & set(unseen.content_hashes()):
        raise SystemExit("Calibration images must not be among the evaluation images.")
    seen, new = (np.concatenate(list(data.batches(s, model.preprocess, BATCH))) for s in (images, unseen))
    labels = None
    if unseen.labels is not None:
        labels = data.match_labels(unseen, model.labels, model.spec.num_classes)
    return Trial(model, seen, new, labels, torch_logits(model, new))


def in_batches(predict: Callable[[Array], Array], pixels: Array) -> Array:
    """(n, C, h, w) -> (n, classes)."""
    return np.concatenate([predict(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)])


def divergence(reference: Array, logits: Array) -> Array:
    """Kullback-Leibler divergence of every prediction from the reference's, (n,) nats."""
    p, q = (torch.from_numpy(x).double().log_softmax(1) for x in (reference, logits))
    found: Array = (p.exp() * (p - q)).sum(1).numpy()
    return found


def score(logits: Array, trial: Trial) -> dict[str, Any]:
    """Agreement in percent, flips and mean divergence from the reference; where labels are known, top-1 with its interval."""
    right, same = logits.argmax(1), int((logits.argmax(1) == trial.reference.argmax(1)).sum())
    found: dict[str, Any] = {
        "agreement": 100 * same / len(logits),
        "flips": len(logits) - same,
        "kl": float(divergence(trial.reference, logits).mean()),
    }
    if trial.labels is not None:
        correct = int((right == trial.labels).sum())
        found |= {
            "top1": 100 * correct / len(logits),
            "top1_ci95": [100 * b for b in proportion_interval(correct, len(logits))],
        }
    return found


def turns(runs: Sequence[Callable[[Array], Any]], pixels: Array, rounds: int) -> Array:
    """(rounds, runs, 2) wall and processor seconds of every run once a round, in a new order each, after a warm-up."""
    times, order = np.zeros((WARMUP + rounds, len(runs), 2)), np.random.default_rng(0)
    for row in times:
        for i in order.permutation(len(runs)):
            wall, cpu = time.perf_counter(), time.process_time()
            runs[i](pixels)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            row[i] = wall, cpu
    return times[WARMUP:]
