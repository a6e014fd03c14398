"""Scale search: evaluations spent and error reached, against trying every candidate, on a trained model's own sites and weights.

    python bench/search.py [MODEL] [--data D] [--images 128]

Each site's histogram and each weight is one problem. Ratios are to the exhaustive search of 102 candidates, per problem; the
published ternary search runs beside ours. Calibration images only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from calibration import data
from calibration.observe import ObservePlan, observe
from compressor import checkpoint
from compressor.quantize.plan import linears
from compressor.quantize.search import Objective, exhaustive, golden, histogram_error, row_error, ternary
from compressor.types import Array, Model, Statistics
from compressor.vit import to_torch


def problems(model: Model, stats: Statistics, bits: int) -> Iterator[tuple[Objective, Array]]:
    steps = 2 ** (bits - 1) - 1
    for site in dict.fromkeys(linears(model.spec).values()):
        yield histogram_error(stats.histograms[site], bits), np.array([stats.histograms[site].amax / steps])
    for name in linears(model.spec):
        rows = model.weights[name].reshape(len(model.weights[name]), -1)
        yield row_error(rows, bits), np.abs(rows).max(1) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--images", type=int, default=128)
    options = parser.parse_args()
    model = checkpoint.load(options.model)
    images = data.open_images(options.data, limit=options.images)
    stats = observe(to_torch(model), data.batches(images, model.preprocess, 32), ObservePlan(moments=()))
    print("| bits | search | evaluations | fewer | error, mean | median | worst |\n|---|---|---|---|---|---|---|")
    for bits in (8, 6, 4):
        best = [exhaustive(*problem) for problem in problems(model, stats, bits)]
        spent = sum(found.evaluations for found in best)
        for search in (golden, ternary):
            found = [search(*problem) for problem in problems(model, stats, bits)]
            count = sum(f.evaluations for f in found)
            ratio = np.array([f.error.sum() / b.error.sum() for f, b in zip(found, best, strict=True)])
            row = f"{spent / count:.2f}x | {ratio.mean():.4f} | {np.median(ratio):.4f} | {ratio.max():.4f}"
            print(f"| {bits} | {search.__name__} | {count / len(found):.1f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
