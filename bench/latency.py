"""Latency of our artifacts beside what others make of the same network, on DeiT shapes at 224 pixels, batch 1.

    python bench/latency.py [--shapes tiny small base] [--threads 1 2] [--rounds 40] [--pruned 0.5] [--json FILE]

Weights and images are random: this measures time, never accuracy. All contestants live in one process and take turns in a
new random order every round, so that a slow moment of the machine hits all of them; ratios are what counts. Wall and
processor time are both taken: on a busy machine the second is the steadier. Every ONNX Runtime session, theirs too, stops
busy waiting when its run ends: otherwise its threads would slow the next contestant's.

Theirs: torch eager; torch.onnx.export (dynamo, opset 20) in ONNX Runtime and OpenVINO; ONNX Runtime's quantize_static as
it comes and per channel; nncf.quantize with ModelType.TRANSFORMER. OpenVINO's int8 models run twice, with f32 and with
bf16 (OpenVINO's own default where the CPU has it) between the int8 operators.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its idle threads must not slow the others

import numpy as np
import torch

import targets
from calibration.observe import ObservePlan, observe
from compressor.device import fingerprint
from compressor.lower import lower
from compressor.quantize import QuantizeConfig, quantize
from compressor.types import (
    Array,
    BlockSpec,
    BuildOptions,
    Model,
    Precision,
    Preprocess,
    Quantization,
    Session,
    VitSpec,
)
from compressor.vit import to_torch
from targets import ov

DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
WARMUP = 3
Run = Callable[[Array], Any]


@dataclass(frozen=True)
class Contestant:
    """One way to run the network. `runtime` and `precision` say with whom it is compared."""

    name: str
    runtime: str
    precision: str
    run: Run

    @property
    def ours(self) -> bool:
        return self.name.startswith("vitrim")


@dataclass
class Times:
    """Milliseconds of every round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


# --------------------------------------------------------------------------- the network


def deit(shape: str, pruned: float) -> Model:
    """Random weights; `pruned` of every block's MLP units and Q/K dimensions removed, to multiples of 8."""
    width, heads = DEIT[shape]

    def kept(size: int) -> int:
        return max(8, round(size * (1 - pruned) / 8) * 8)

    block = BlockSpec(heads, kept(64), 64, kept(4 * width))
    spec = VitSpec((224, 224), (16, 16), 3, width, (block,) * 12)
    rng = np.random.default_rng(0)
    weights = {}
    for name, size in spec.shapes().items():
        spread = 0.02 if len(size) < 2 or name in ("pos", "prefix") else 1 / np.sqrt(np.prod(size[1:]))
        weights[name] = (spread * rng.standard_normal(size, dtype=np.float32)).astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
        if name.endswith(".q.weight"):
            weights[name] /= 8
    return Model(spec, weights, Preprocess(spec.image_size))


def images(count: int) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((1, 3, 224, 224), dtype=np.float32) for _ in range(count)]


class Plain(torch.nn.Module):
    """The network without its tap argument, which an exporter cannot trace."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner = to_torch(model)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.inner(pixels)


# --------------------------------------------------------------------------- theirs


def ort_run(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})


def ov_run(path: Path, threads: int, hint: str) -> Run:
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": hint}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda pixels: request.infer({0: pixels}, share_inputs=True)


def torch_run(model: Model) -> Run:
    module = to_torch(model)

    def run(pixels: Array) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(pixels))

    return run


def peer_files(model: Model, folder: Path) -> dict[str, Path]:
    """What the other tools make of the network; files already there are used again."""
    files = {n: folder / f"{n}.onnx" for n in ("export", "static", "static per channel")}
    files["nncf"] = folder / "nncf.xml"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not files["export"].exists():
            named = {"input_names": ["pixels"], "output_names": ["logits"], "opset_version": 20}
            example = (torch.from_numpy(images(1)[0]),)
            torch.onnx.export(
                Plain(model), example, files["export"], dynamo=True, external_data=False, verbose=False, **named
            )
        static_files(files)
        if not files["nncf"].exists():
            import nncf
            import openvino

            data = nncf.Dataset(images(8), lambda pixels: {"pixels": pixels})
            kind = nncf.ModelType.TRANSFORMER
            found = nncf.quantize(openvino.Core().read_model(files["export"]), data, model_type=kind, subset_size=8)
            openvino.save_model(found, files["nncf"], compress_to_fp16=False)
    return files


def static_files(files: Mapping[str, Path]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images(8))

        def get_next(self) -> dict[str, Array] | None:
            pixels = next(self.left, None)
            return None if pixels is None else {"pixels": pixels}

    for name, per_channel in (("static", False), ("static per channel", True)):
        if not files[name].exists():
            quantize_static(str(files["export"]), str(files[name]), Reader(), per_channel=per_channel)


def theirs(model: Model, files: Mapping[str, Path], threads: int) -> list[Contestant]:
    found = [Contestant("torch eager", "torch", "float", torch_run(model))]
    for name, precision in (("export", "float"), ("static", "int8"), ("static per channel", "int8")):
        found.append(Contestant(f"ort {name}", "ort", precision, ort_run(files[name], threads)))
    for name, hint, precision in (
        ("export", "f32", "float"),
        ("export", "bf16", "bf16"),
        ("nncf", "f32", "int8"),
        ("nncf", "bf16", "int8"),
    ):
        run = ov_run(files[name], threads, hint)
        found.append(Contestant(f"openvino {name} {hint}", "openvino", precision, run))
    return found


# --------------------------------------------------------------------------- ours


def plan(model: Model) -> Quantization:
    stats = observe(to_torch(model), images(8), ObservePlan(moments=(), pair_energy=False))
    return quantize(model, stats, QuantizeConfig("w8a8"))


def session_run(session: Session) -> Run:
    return lambda pixels: session.run({"pixels": pixels})


def ours(model: Model, integers: Quantization, folder: Path, threads: int) -> list[Contestant]:
    found = []
    kinds: dict[Precision, str] = {"fp32": "float", "bf16": "bf16", "w8a8": "int8"}
    for name in ("ort", "openvino"):
        target = targets.get(name)
        for precision in (p for p in target.CAPABILITIES.precisions if p in kinds):
            graph = lower(model, target.CAPABILITIES, integers if precision == "w8a8" else None)
            artifact = target.build(graph, BuildOptions(folder / name, precision, precision))
            for variant in ov.variants(artifact) if name == "openvino" else (artifact,):
                session = target.open(variant, threads=threads)
                label = f"vitrim {name} {precision} {variant.settings.get(ov.HINT, '')}".strip()
                found.append(Contestant(label, name, kinds[precision], session_run(session)))
    return found


# --------------------------------------------------------------------------- the race


def race(contestants: list[Contestant], rounds: int) -> dict[str, Times]:
    """Every contestant once a round, in a new order each."""
    times = {c.name: Times() for c in contestants}
    (pixels,), order = images(1), list(contestants)
    shuffler = random.Random(0)
    for number in range(WARMUP + rounds):
        shuffler.shuffle(order)
        for contestant in order:
            wall, cpu = time.perf_counter(), time.process_time()
            contestant.run(pixels)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number >= WARMUP:
                times[contestant.name].wall.append(1e3 * wall)
                times[contestant.name].cpu.append(1e3 * cpu)
    return times


def row(times: Times) -> dict[str, float]:
    return {
        "min": min(times.wall),
        "median": float(np.median(times.wall)),
        "cpu_min": min(times.cpu),
        "cpu_median": float(np.median(times.cpu)),
    }


def ratios(contestants: list[Contestant], rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Our best over their best: within each runtime and precision, within each runtime, and over everything."""
    groups: dict[str, list[Contestant]] = {"any": contestants}
    for runtime in ("ort", "openvino"):
        groups[runtime] = [c for c in contestants if c.runtime == runtime]
        for precision in ("float", "bf16", "int8"):
            groups[f"{runtime} {precision}"] = [c for c in groups[runtime] if c.precision == precision]
    found: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        mine, peers = ([rows[c.name] for c in group if c.ours == side] for side in (True, False))
        if mine and peers:
            found[name] = {m: min(r[m] for r in mine) / min(r[m] for r in peers) for m in mine[0]}
    return found


def show(title: str, rows: Mapping[str, Mapping[str, float]], compared: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\n{title}\n{'ms':32s} {'wall min':>9s} {'median':>9s} {'cpu min':>9s} {'median':>9s}")
    for name, values in rows.items():
        print(f"{name:32s} " + " ".join(f"{v:9.2f}" for v in values.values()))
    print(f"{'ours / best of theirs':32s}")
    for name, values in compared.items():
        print(f"{name:32s} " + " ".join(f"{v:9.2f}" for v in values.values()))


def measure(shape: str, threads: int, rounds: int, pruned: float, peers: Path) -> dict[str, Any]:
    model = deit(shape, pruned)
    folder = peers / f"{shape}-{pruned:g}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    files = peer_files(model, folder)
    with tempfile.TemporaryDirectory() as own:
        contestants = theirs(model, files, threads) + ours(model, plan(model), Path(own), threads)
        times = race(contestants, rounds)
    rows = {name: row(t) for name, t in times.items()}
    compared = ratios(contestants, rows)
    show(f"DeiT-{shape}, pruned {pruned:g}, {threads} threads, {rounds} rounds", rows, compared)
    return {"shape": shape, "threads": threads, "pruned": pruned, "rounds": rounds, "ms": rows, "ratios": compared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=DEIT, default=list(DEIT))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pruned", type=float, default=0.0, help="fraction of MLP units and Q/K dimensions removed")
    parser.add_argument("--peers", type=Path, help="folder that keeps the peers' files between runs")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    packages = ("torch", "onnxruntime", "openvino", "nncf")
    device = fingerprint({package: version(package) for package in packages})
    print(json.dumps(device))
    with tempfile.TemporaryDirectory() as temporary:
        peers = options.peers or Path(temporary)
        given = [(shape, threads) for shape in options.shapes for threads in options.threads]
        results = [measure(shape, threads, options.rounds, options.pruned, peers) for shape, threads in given]
    if options.json:
        options.json.write_text(json.dumps({"device": device, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
