"""Latency of dense and pruned Vision Transformers on one CUDA GPU, and the time the pruning pass itself takes.

    python bench/gpu.py [--models deit-tiny,vit-large] [--batches 1,32] [--seconds 2] [--no-prune] [--out FILE]

Needs torch with CUDA; TensorRT or TensorRT-RTX engines join where their Python package can be imported. Weights and images
are random: this measures time, never accuracy. All contestants of one model and batch run in one interleaved race, each
sample the mean of a few forward passes between two CUDA events, warm-up first; tables show medians. Inputs and outputs
stay on the GPU.

    eager        the network as it is written, one kernel launch after another
    compiled     torch.compile on each block, the whole forward pass replayed as one CUDA graph
    engine       TensorRT or TensorRT-RTX from vitrim's own graph, replayed as one CUDA graph where the runtime can
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.observe import ObservePlan, observe
from compressor.lower import lower
from compressor.prune import PRUNERS, configure, prune
from compressor.quantize.grid import symmetric
from compressor.quantize.plan import for_target, linears
from compressor.types import BlockSpec, BuildOptions, Model, Precision, Preprocess, Quantization, VitSpec, Width
from compressor.vit import VisionTransformer, to_torch
from targets import _tensorrt_worker, trt, trt_rtx

Run = Callable[[], object]


def plain(dim: int, heads: int, depth: int, patch: int = 16) -> VitSpec:
    block = BlockSpec(heads, dim // heads, dim // heads, 4 * dim)
    return VitSpec((224, 224), (patch, patch), 3, dim, (block,) * depth)


MODELS = {
    "deit-tiny": plain(192, 3, 12),
    "deit-small": plain(384, 6, 12),
    "deit-base": plain(768, 12, 12),
    "vit-large": plain(1024, 16, 24),
    "deit-huge": plain(1280, 16, 32, patch=14),
    "smoke": replace(plain(64, 2, 2), image_size=(32, 32)),  # to try this file, not to measure
}
WIDTHS: dict[Precision, Width | None] = {"fp16": None, "w8a8": 8, "fp8": "e4m3"}  # of the engines' quantized linears
FIRST_FP8 = (8, 9)  # compute capability
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def shrink(spec: VitSpec, mlp: float, qk: float, v: float) -> VitSpec:
    """`spec` with these shares of hidden units, query/key and value dimensions removed, in multiples of 8."""

    def kept(width: int, share: float) -> int:
        return max(8, round(width * (1 - share) / 8) * 8) if share else width

    blocks = (
        replace(b, mlp_dim=kept(b.mlp_dim, mlp), qk_dim=kept(b.qk_dim, qk), v_dim=kept(b.v_dim, v)) for b in spec.blocks
    )
    return replace(spec, blocks=tuple(blocks))


VARIANTS = {"dense": (0.0, 0.0, 0.0), "mlp+qk": (0.5, 0.5, 0.0), "mlp+qk+v": (0.5, 0.5, 0.5)}


# --------------------------------------------------------------------------- contestants


class Graph:
    """`run` captured once as a CUDA graph; calling replays it."""

    def __init__(self, run: Run) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = run()

    def __call__(self) -> object:
        self._graph.replay()
        return self.output


def forward_compiled(module: VisionTransformer) -> Callable[[torch.Tensor], torch.Tensor]:
    """`module` with its block compiled; blocks of one shape share the compiled code."""
    step = torch.compile(lambda block, x: block(x), dynamic=False)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        x = module.embed(pixels)
        for block in module.blocks:
            x = step(block, x)
        return module.classify(x)

    return forward


def torch_contestants(model: Model, pixels: torch.Tensor, expected: torch.Tensor) -> dict[str, Run]:
    """Eager in every float type, and compiled in fp16."""
    runs: dict[str, Run] = {}
    for name, dtype in DTYPES.items():
        module, fed = to_torch(model).to(pixels.device, dtype), pixels.to(dtype)
        runs[f"eager {name}"] = partial(module, fed)
        check(f"eager {name}", expected, module(fed))
        if name == "fp16":
            torch._dynamo.reset()
            compiled = partial(forward_compiled(module), fed)
            check("compiled fp16", expected, compiled())
            runs["compiled fp16"] = Graph(compiled) if pixels.is_cuda else compiled
    return runs


def engine_contestants(model: Model, pixels: torch.Tensor, expected: torch.Tensor) -> dict[str, Run]:
    """fp16, w8a8 and fp8 engines from vitrim's own graph; none where no TensorRT can be imported or no GPU is."""
    runs: dict[str, Run] = {}
    for target in (trt, trt_rtx):
        if find_spec(target.PACKAGE) is None or not pixels.is_cuda:
            continue
        for precision, width in WIDTHS.items():
            if precision == "fp8" and torch.cuda.get_device_capability() < FIRST_FP8:
                continue
            graph = lower(model, target.CAPABILITIES, grids(model, width) if width else None)
            with tempfile.TemporaryDirectory() as folder:
                planned = target.plan(graph, BuildOptions(Path(folder), precision))
                tuned = {**planned.settings, "batch": str(len(pixels))}
                artifact = target.build_engine(replace(planned, settings=tuned), Path(folder))
                context = _tensorrt_worker.Engine(target.PACKAGE, str(artifact.path)).context
            out = torch.full_like(expected, float("nan"))
            run = partial(enqueue, context, pixels, out)
            run()
            # Grids of random weights say nothing about accuracy: such logits only have to be finite.
            check(f"{target.NAME} {precision}", expected, out, float("inf") if width else 0.05)
            runs[f"{target.NAME} {precision}"] = Graph(run)
    return runs


def enqueue(context: Any, pixels: torch.Tensor, out: torch.Tensor) -> None:
    """One inference of a TensorRT execution context on torch's current stream."""
    context.set_input_shape("pixels", tuple(pixels.shape))
    context.set_tensor_address("pixels", pixels.data_ptr())
    context.set_tensor_address("logits", out.data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise SystemExit("TensorRT: the engine does not run.")


def grids(model: Model, width: Width = 8) -> Quantization:
    """Grids for every linear of the target, of the right form and of no meaning."""
    precision: Precision = "w8a8" if width == 8 else "fp8"
    config = for_target(trt.CAPABILITIES, precision)
    sites = {name: site for name, site in linears(model.spec).items() if not config.is_skipped(name)}
    scales = {name: np.abs(model.weights[name].reshape(len(model.weights[name]), -1)).max(1) for name in sites}
    weights = {name: symmetric(amax, width, axis=0) for name, amax in scales.items()}
    return Quantization(weights, {site: symmetric(4.0, width) for site in sites.values()}, precision)


def check(name: str, expected: torch.Tensor, got: torch.Tensor, limit: float = 0.05) -> None:
    """A contestant that computes something else has no latency."""
    error = ((got.float() - expected).norm() / expected.norm()).item()
    if not error < limit:
        raise SystemExit(f"{name}: outputs must be within {limit:.0%} of fp32, got {error:.1%}.")


# --------------------------------------------------------------------------- race


def race(runs: dict[str, Run], seconds: float, device: torch.device) -> dict[str, float]:
    """Median milliseconds of one forward pass by name; contestants take turns, in alternating direction."""
    with torch.inference_mode():
        loops = {name: max(1, round(4.0 / timed(run, 3, device, warmup=5))) for name, run in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        end, order = time.perf_counter() + seconds, list(runs)
        while time.perf_counter() < end or len(samples[order[0]]) < 7:
            for name in order:
                samples[name].append(timed(runs[name], loops[name], device))
            order.reverse()
    return {name: statistics.median(taken) for name, taken in samples.items()}


def timed(run: Run, loops: int, device: torch.device, warmup: int = 1) -> float:
    """Mean milliseconds of `loops` calls after `warmup` untimed ones."""
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(loops):
            run()
        return 1e3 * (time.perf_counter() - started) / loops
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(loops):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / loops


def latency_table(name: str, batch: int, seconds: float, device: torch.device) -> Iterator[str]:
    """Lines of a Markdown table: one row per backend, one column per variant, milliseconds and ratio to dense."""
    runs: dict[str, Run] = {}
    with torch.inference_mode():
        for variant, shares in VARIANTS.items():
            model = random_model(shrink(MODELS[name], *shares))
            pixels = torch.randn(batch, model.spec.in_chans, *model.spec.image_size, device=device)
            expected = to_torch(model).to(device)(pixels)
            contestants = torch_contestants(model, pixels, expected) | engine_contestants(model, pixels, expected)
            runs |= {f"{variant}|{backend}": run for backend, run in contestants.items()}
    medians = race(runs, seconds, device)
    for backend in dict.fromkeys(key.partition("|")[2] for key in runs):
        times = {variant: medians[f"{variant}|{backend}"] for variant in VARIANTS}
        base = times.pop("dense")
        pruned = "".join(f" {t:.3f} | {base / t:.2f}x |" for t in times.values())
        yield f"| {name} | {batch} | {backend} | {base:.3f} |{pruned}"


# --------------------------------------------------------------------------- the pruning pass


@functools.lru_cache(maxsize=len(VARIANTS))
def random_model(spec: VitSpec) -> Model:
    """Random weights, in the form a checkpoint would be read into."""
    rng = np.random.default_rng(0)
    weights = {n: np.float32(0.02) * rng.standard_normal(s, dtype=np.float32) for n, s in spec.shapes().items()}
    for name, weight in weights.items():
        if "norm" in name and name.endswith("weight"):
            weight[:] = 1.0
    return Model(spec, weights, Preprocess(spec.image_size))


def pruning_row(name: str, pruner: str, images: int, device: torch.device) -> str:
    """One Markdown row: seconds of the statistics pass, of the algebra with the measuring pass, and of all."""
    known = {f.name for f in fields(PRUNERS[pruner][0])}
    config = configure(pruner, {ratio: 0.5 for ratio in ("mlp_ratio", "qk_ratio", "vo_ratio") if ratio in known})
    model, rng = random_model(MODELS[name]), np.random.default_rng(1)
    size = min(64, images)
    batches = [rng.standard_normal((size, 3, *model.spec.image_size), dtype=np.float32) for _ in range(images // size)]
    spent = 0.0

    def watched(module: VisionTransformer, fed: object) -> object:
        nonlocal spent
        started = time.perf_counter()
        stats = observe(module, batches, ObservePlan(tokens_per_image=None))
        spent = time.perf_counter() - started
        return stats

    started = time.perf_counter()
    pruned = prune(model, lambda: batches, config, watched, device)  # type: ignore[arg-type]
    total = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    share = 100 * pruned.model.spec.params() / model.spec.params()
    times = f"{spent:.1f} | {total - spent:.1f} | {total:.1f}"
    return f"| {name} | {pruner} | {len(batches) * size} | {times} | {peak:.1f} | {share:.0f} % |"


# --------------------------------------------------------------------------- report


def environment(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.processor() or 'CPU'}, torch {torch.__version__}: a trial run, not a measurement"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, compute capability "
        f"{properties.major}.{properties.minor}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}"
    )


def report(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    yield f"{environment(device)}. Random weights, 224 pixels, milliseconds per batch (median). `{' '.join(sys.argv)}`\n"
    yield "| model | batch | backend | dense | " + " | ".join(f"{v} 50 % | speed-up" for v in list(VARIANTS)[1:]) + " |"
    yield "|---" * (4 + 2 * (len(VARIANTS) - 1)) + "|"
    for name in options.models.split(","):
        for batch in map(int, options.batches.split(",")):
            yield from latency_table(name, batch, options.seconds, device)
    if options.no_prune:
        return
    yield "\nThe pruning pass: statistics of every token, then ranking, compensation and measuring every branch.\n"
    yield "| model | pruner | images | statistics s | rest s | total s | peak GB | parameters left |"
    yield "|---" * 8 + "|"
    for name in options.prune.split(","):
        for pruner in PRUNERS:
            yield pruning_row(name, pruner, options.images, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="deit-tiny,deit-small,deit-base,vit-large")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each race: one model, one batch, every backend")
    parser.add_argument("--prune", default="vit-large,deit-huge", help="shapes the pruning pass is timed on")
    parser.add_argument("--images", type=int, default=1024, help="calibration images of the pruning pass")
    parser.add_argument("--no-prune", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, lines = time.perf_counter(), []
    for line in report(options, device):
        print(line, flush=True)
        lines.append(line)
    lines.append(f"\n{time.perf_counter() - started:.0f} s in all.")
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
