"""Cost of the stages on a DeiT-Base shape: statistics beside the plain forward pass, memory, lowering, `vitrim --help`.

    python bench/compress.py [--images 256] [--batch 16] [--threads 2]
    python bench/compress.py --prune [--images 512] [--shape large]     pruning by obs beside the plain forward pass
    python bench/compress.py --quantize [--images 256]                  w8a8 calibration beside the plain forward pass

Weights and images are random: this measures time and memory, never accuracy. The plain passes are interleaved with what
they are compared with, batch by batch or block by block, so a slow moment of the machine hits both; ratios count.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from calibration.observe import ObservePlan, observe
from compressor.prune import ObsConfig, prune
from compressor.prune.sequential import SequentialPass
from compressor.quantize import QuantizeConfig
from compressor.quantize.importance import token_importance
from compressor.quantize.refine import RefineConfig, refine
from compressor.types import Array, BlockSpec, Capabilities, Model, Preprocess, VitSpec
from compressor.vit import VisionTransformer, to_torch

DEIT_BASE = VitSpec((224, 224), (16, 16), 3, 768, (BlockSpec(12, 64, 64, 3072),) * 12)
SHAPES = {"base": DEIT_BASE, "large": VitSpec((224, 224), (16, 16), 3, 1024, (BlockSpec(16, 64, 64, 4096),) * 24)}


def random_model(spec: VitSpec) -> Model:
    rng = np.random.default_rng(0)
    weights = {n: (0.02 * rng.standard_normal(s)).astype(np.float32) for n, s in spec.shapes().items()}
    for name, weight in weights.items():
        if "norm" in name and name.endswith("weight"):
            weight[:] = 1.0
    return Model(spec, weights, Preprocess(spec.image_size))


class Interleaved:
    """Feeds `observe`, timing it from outside, and runs the plain forward pass on the same batch in between."""

    def __init__(self, module: VisionTransformer, images: int, batch: int) -> None:
        self.module, self.images, self.batch = module, images, batch
        self.plain_s, self.other_s = 0.0, 0.0

    def __iter__(self) -> Iterator[Array]:
        rng = np.random.default_rng(1)
        for start in range(0, self.images, self.batch):
            size = min(self.batch, self.images - start)
            started = time.perf_counter()
            pixels = rng.standard_normal((size, 3, 224, 224), dtype=np.float32)
            drawn = time.perf_counter()
            with torch.inference_mode():
                self.module(torch.from_numpy(pixels))
            self.plain_s += time.perf_counter() - drawn
            self.other_s += time.perf_counter() - started
            yield pixels


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_statistics(module: VisionTransformer, images: int, batch: int) -> None:
    with torch.inference_mode():
        module(torch.zeros(batch, 3, 224, 224))  # warm-up
    feed = Interleaved(module, images, batch)
    started = time.perf_counter()
    observe(module, feed, ObservePlan())
    made_s = time.perf_counter() - started - feed.other_s
    print(f"plain forward pass     {feed.plain_s:8.2f} s   {images} images, batch {batch}")
    print(f"statistics pass        {made_s:8.2f} s   ratio {made_s / feed.plain_s:.2f} (goal 1.50)")
    print(f"peak memory            {peak_gb():8.2f} GB  (goal 3.00)")


class Cost:
    """Wall and processor seconds of what ran inside ``with``, added up."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def time_pruning(model: Model, images: int, batch: int) -> None:
    """Half of every width; the goal is 3 times the two plain passes that it needs, plus 6 minutes of algebra.

    Plain forward passes run after every block, a share each of about one pass, and are taken off the total.
    """
    network, plain, total = to_torch(model), Cost(), Cost()
    size = (3, *model.spec.image_size)
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, *size), dtype=np.float32))
    rounds = max(1, images // len(model.spec.blocks) // batch)
    compress = SequentialPass.compress

    def batches() -> Iterator[Array]:
        rng = np.random.default_rng(1)
        for start in range(0, images, batch):
            yield rng.standard_normal((min(batch, images - start), *size), dtype=np.float32)

    def paced(*given: Any) -> Any:
        found = compress(*given)
        with plain:
            for _ in range(rounds):
                network(sample)
        return found

    with mock.patch.object(SequentialPass, "compress", paced), total:
        prune(model, batches, ObsConfig(0.5, 0.5, 0.5), lambda module, feed: observe(module, feed, ObservePlan()))
    share = images / (rounds * batch * len(model.spec.blocks))
    for kind, all_s, plain_s in (("wall", total.wall, plain.wall), ("cpu", total.cpu, plain.cpu)):
        one, made = share * plain_s, all_s - plain_s
        print(f"{kind:4s} plain forward pass {one:8.2f} s   {images} images, batch {batch}")
        print(f"{kind:4s} obs, half of all   {made:8.2f} s   {made / one:.2f} passes (goal {6 * one + 360:.0f} s)")
    print(f"peak memory            {peak_gb():8.2f} GB  (goal 4.00 for base, 10.00 for large)")


def time_quantizing(model: Model, images: int, batch: int) -> None:
    """Token importance, grids, refits and rounding of every layer; the goal is 2.5 times the two plain passes it needs."""
    rng = np.random.default_rng(1)
    pixels = [rng.standard_normal((batch, 3, *model.spec.image_size), dtype=np.float32) for _ in range(images // batch)]
    network, started = to_torch(model), time.process_time()
    with torch.inference_mode():
        for batch_pixels in pixels:
            network(torch.from_numpy(batch_pixels))
    plain, started = time.process_time() - started, time.process_time()
    importance = token_importance(network, pixels[: max(1, 32 // batch)])
    weighed, started = time.process_time() - started, time.process_time()
    refine(model, pixels, RefineConfig(QuantizeConfig("w8a8", asymmetric=("fc2", "patch"))), importance)
    total = weighed + time.process_time() - started
    print(f"plain forward pass     {plain:8.2f} s of processor time, {images} images, batch {batch}")
    print(f"w8a8 calibration       {total:8.2f} s   {total / (2 * plain):.2f} times two passes (goal 2.50)")
    print(f"peak memory            {peak_gb():8.2f} GB  (goal 4.00)")


def time_lowering(model: Model) -> None:
    from compressor.lower import lower

    started = time.perf_counter()
    lower(model, Capabilities("tokens", 17, (), gelu="erf"))
    print(f"lowering               {time.perf_counter() - started:8.2f} s   (goal 1.00)")


def time_help() -> None:
    command = [str(Path(sys.executable).with_name("vitrim")), "--help"]
    samples = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        samples.append(time.perf_counter() - started)
    print(f"vitrim --help          {min(samples):8.2f} s   best of 5 (goal 0.30)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="base")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--quantize", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_model(SHAPES[options.shape])
    print(f"DeiT {options.shape} shape, random weights, {options.threads} threads, torch {torch.__version__}")
    if options.prune:
        time_pruning(model, options.images, options.batch)
        return
    if options.quantize:
        time_quantizing(model, options.images, options.batch)
        return
    time_statistics(to_torch(model), options.images, options.batch)
    time_lowering(model)
    time_help()


if __name__ == "__main__":
    main()
