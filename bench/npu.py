"""Plain export against vitrim's form on every NPU compiler that is installed here.

    python bench/npu.py [--depth 2] [--size tiny] [--effort O2] [--images 100] [--target bpu]

Latencies are the vendor's estimates, never measurements, and the same effort of the compiler is used for both graphs. The DeiT
shapes have random weights: only placement and latency are read from them. Agreement with float is measured on the embedded
model, on evaluation images; the compiler calibrates on calibration images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import targets
from calibration import data
from compressor import checkpoint
from compressor.errors import VitrimError
from compressor.lower import lower
from compressor.stages import torch_logits
from compressor.types import Array, Artifact, BlockSpec, BuildOptions, Capabilities, Model, Preprocess, VitSpec
from targets import _estimate, bpu

WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
CALIBRATION = 50


def deit(size: str, depth: int) -> Model:
    width, heads = WIDTHS[size]
    spec = VitSpec((224, 224), (16, 16), 3, width, (BlockSpec(heads, 64, 64, 4 * width),) * depth)
    rng = np.random.default_rng(0)
    weights = {n: (0.02 * rng.standard_normal(s)).astype(np.float32) for n, s in spec.shapes().items()}
    ones = {n: np.ones_like(w) for n, w in weights.items() if "norm" in n and n.endswith("weight")}
    return Model(spec, weights | ones, Preprocess(spec.image_size))


def forms(name: str) -> dict[str, Capabilities]:
    """A plain export (tokens, softmax and norm as they come) at an opset the compiler reads, and ours."""
    ours = targets.get(name).CAPABILITIES
    plain = Capabilities("tokens", ours.opset, ours.precisions, qdq="none", batch="static", gelu="erf")
    return {"plain": plain, "ours": ours}


def make(model: Model, name: str, form: Capabilities, options: BuildOptions, effort: str) -> Artifact:
    graph = lower(model, form)
    return bpu.compile_graph(graph, options, effort) if name == "bpu" else targets.get(name).build(graph, options)


def row(label: str, artifact: Artifact, seconds: float, agreement: str) -> str:
    found = _estimate.read(artifact)
    latency = "-" if found.latency_ms is None else f"{found.latency_ms:.2f}"
    return (
        f"{label:<34} {latency:>9} {len(found.subgraphs):>9} {len(found.cpu_ops):>7} {100 * found.npu_mac_share:>9.1f}"
        f" {artifact.size_bytes / 1e6:>7.1f} {seconds:>8.0f} {agreement:>12}"
    )


def agreement(model: Model, name: str, artifact: Artifact, pixels: Array) -> str:
    got = targets.get(name).open(artifact).run({"pixels": pixels})["logits"]
    same = int((got.argmax(1) == torch_logits(model, pixels).argmax(1)).sum())
    return f"{same}/{len(pixels)}"


def load(model: Model, source: str, count: int) -> Array:
    images = data.open_images(source, limit=count)
    return np.concatenate(list(data.batches(images, model.preprocess, 50)))[:count]


def compare(name: str, label: str, model: Model, calibration: Array, args: argparse.Namespace) -> None:
    real = label == "embedded"
    for form, capabilities in forms(name).items():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            precision = capabilities.precisions[0]
            options = BuildOptions(Path(folder), precision, calibration=(calibration,))
            try:
                artifact = make(model, name, capabilities, options, args.effort)
            except VitrimError as error:
                print(f"{f'{name} {label} {form}':<34} does not build: {error}", flush=True)
                continue
            seconds = time.perf_counter() - started
            same = agreement(model, name, artifact, load(model, "demo:eval", args.images)) if real else "-"
            print(row(f"{name} {precision} {label} {form}", artifact, seconds, same), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", action="append", choices=("bpu", "qnn"))
    parser.add_argument("--depth", type=int, default=2, help="blocks of the DeiT shape; 0 leaves it out")
    parser.add_argument("--size", choices=WIDTHS, default="tiny")
    parser.add_argument("--effort", default="O2", help="of HBDK; O0 compiles in seconds and its latency means nothing")
    parser.add_argument(
        "--images", type=int, default=100, help="evaluation images of the embedded model; 0 leaves it out"
    )
    args = parser.parse_args()
    print(
        f"{'':<34} {'ms (est.)':>9} {'subgraphs':>9} {'CPU ops':>7} {'% MACs NPU':>9} {'MB':>6} {'build s':>8} {'agreement':>12}"
    )
    for name in args.target or ("bpu", "qnn"):
        state = targets.get(name).available()
        if not state.available:
            print(f"{name:<34} left out: {state.reason}; {state.fix}")
            continue
        if args.depth:
            model = deit(args.size, args.depth)
            noise = np.random.default_rng(1).standard_normal((2, 3, 224, 224)).astype(np.float32)
            compare(name, f"DeiT-{args.size} {args.depth} blocks", model, noise, args)
        if args.images:
            model = checkpoint.load("demo")
            compare(name, "embedded", model, load(model, "demo", CALIBRATION), args)


if __name__ == "__main__":
    main()
