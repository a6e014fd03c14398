"""Latency of our artifacts beside what others make of the same network, on DeiT shapes at 224 pixels, batch 1.

    python bench/latency.py [--shapes tiny small base] [--threads 1 2] [--rounds 40] [--json FILE]
    python bench/latency.py --pruned 0.5 [--shapes demo tiny ...]     pruned beside dense, every precision, without peers

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
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its idle threads must not slow the others

import numpy as np
import torch
from trial import turns

import targets
from calibration.observe import ObservePlan, observe
from compressor import checkpoint
from compressor.device import fingerprint
from compressor.intervals import paired_ratio
from compressor.lower import lower
from compressor.prune import ObsConfig, obs
from compressor.quantize import quantize
from compressor.quantize.grid import symmetric
from compressor.quantize.plan import for_target
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
SHAPES = ("demo", *DEIT)
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


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round."""

    wall: list[float]
    cpu: list[float]


# --------------------------------------------------------------------------- the network


def spec_of(shape: str) -> VitSpec:
    if shape == "demo":
        return checkpoint.load("demo").spec
    width, heads = DEIT[shape]
    return VitSpec((224, 224), (16, 16), 3, width, (BlockSpec(heads, 64, 64, 4 * width),) * 12)


def pruned_spec(spec: VitSpec, ratio: float) -> VitSpec:
    """`ratio` of every block's MLP units, query/key and value dimensions removed, to multiples of 8."""
    config = ObsConfig(ratio, ratio, ratio, width_multiple=8)
    return replace(spec, blocks=tuple(obs.uniform(block, config) for block in spec.blocks))


def network(spec: VitSpec) -> Model:
    """Random weights."""
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


def images(spec: VitSpec, count: int) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((1, spec.in_chans, *spec.image_size), dtype=np.float32) for _ in range(count)]


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
            example = (torch.from_numpy(images(model.spec, 1)[0]),)
            torch.onnx.export(
                Plain(model), example, files["export"], dynamo=True, external_data=False, verbose=False, **named
            )
        static_files(files, images(model.spec, 8))
        if not files["nncf"].exists():
            import nncf
            import openvino

            data = nncf.Dataset(images(model.spec, 8), lambda pixels: {"pixels": pixels})
            kind = nncf.ModelType.TRANSFORMER
            found = nncf.quantize(openvino.Core().read_model(files["export"]), data, model_type=kind, subset_size=8)
            openvino.save_model(found, files["nncf"], compress_to_fp16=False)
    return files


def static_files(files: Mapping[str, Path], calibration: list[Array]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

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
    stats = observe(to_torch(model), images(model.spec, 8), ObservePlan(moments=(), pair_energy=False))
    return quantize(model, stats, for_target(targets.get("ort").CAPABILITIES, "w8a8"))


def with_scores(model: Model, integers: Quantization) -> Quantization:
    """`integers` with a grid for every q and k, as wide as the largest value seen."""
    reach: dict[str, float] = {}

    def look(site: str, x: torch.Tensor) -> torch.Tensor:
        if site.endswith((".q", ".k")):
            reach[site] = float(x.abs().max())
        return x

    to_torch(model)(torch.from_numpy(images(model.spec, 1)[0]), look)
    return replace(integers, activations={**integers.activations, **{s: symmetric(r, 8) for s, r in reach.items()}})


def session_run(session: Session) -> Run:
    return lambda pixels: session.run({"pixels": pixels})


def ours(model: Model, integers: Quantization, folder: Path, threads: int) -> list[Contestant]:
    found = []
    kinds: dict[Precision, str] = {"fp32": "float", "bf16": "bf16", "w8a8": "int8"}
    for name in ("ort", "openvino"):
        target = targets.get(name)
        for precision in (p for p in target.CAPABILITIES.precisions if p in kinds):
            plans: dict[str, Quantization | None] = {precision: integers if precision == "w8a8" else None}
            if precision == "w8a8" and target.CAPABILITIES.int8_scores:
                plans["w8a8-scores"] = with_scores(model, integers)
            for label, grids in plans.items():
                graph = lower(model, target.CAPABILITIES, grids)
                artifact = target.build(graph, BuildOptions(folder / name, precision, label))
                for variant in targets.variants(name, artifact):
                    session = target.open(variant, threads=threads)
                    full = f"vitrim {name} {label} {variant.settings.get(ov.HINT, '')}".strip()
                    found.append(Contestant(full, name, kinds[precision], session_run(session)))
    return found


# --------------------------------------------------------------------------- the race


def race(contestants: list[Contestant], pixels: Array, rounds: int) -> dict[str, Times]:
    """Every contestant once a round, in a new order each."""
    measured = 1e3 * turns([c.run for c in contestants], pixels, rounds)
    return {c.name: Times(*measured[:, i].T.tolist()) for i, c in enumerate(contestants)}


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


def measure(shape: str, threads: int, rounds: int, peers: Path) -> dict[str, Any]:
    model = network(spec_of(shape))
    folder = peers / shape
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    files = peer_files(model, folder)
    with tempfile.TemporaryDirectory() as own:
        contestants = theirs(model, files, threads) + ours(model, plan(model), Path(own), threads)
        times = race(contestants, images(model.spec, 1)[0], rounds)
    rows = {name: row(t) for name, t in times.items()}
    compared = ratios(contestants, rows)
    show(f"{shape}, {threads} threads, {rounds} rounds", rows, compared)
    return {"shape": shape, "threads": threads, "rounds": rounds, "ms": rows, "ratios": compared}


# --------------------------------------------------------------------------- pruned beside dense


def measure_pruned(shape: str, threads: int, rounds: int, pruned: float) -> dict[str, Any]:
    """One race of every artifact of the dense and of the pruned network; prints a row for each pair."""
    dense = network(spec_of(shape))
    small = network(pruned_spec(dense.spec, pruned))
    torch.set_num_threads(threads)
    contestants = []
    with tempfile.TemporaryDirectory() as own:
        for label, model in (("dense", dense), ("pruned", small)):
            made = ours(model, plan(model), Path(own) / label, threads)
            contestants += [replace(c, name=f"{label} {c.name}") for c in made]
        times = race(contestants, images(dense.spec, 1)[0], rounds)
    found = {}
    for name in (c.name.removeprefix("dense vitrim ") for c in contestants if c.name.startswith("dense")):
        before, after = times[f"dense vitrim {name}"], times[f"pruned vitrim {name}"]
        wall, cpu = paired_ratio(after.wall, before.wall), paired_ratio(after.cpu, before.cpu)
        found[name] = {"dense": row(before), "pruned": row(after), "wall": asdict(wall), "cpu": asdict(cpu)}
        cells = [f"{shape}, {threads}", f"{small.spec.macs() / dense.spec.macs():.2f}", name]
        cells += [f"{np.median(before.wall):.2f}", f"{np.median(after.wall):.2f}"]
        cells += [f"{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in (wall, cpu)]
        print("| " + " | ".join([*cells, "yes" if cpu.is_faster else "**no**"]) + " |", flush=True)
    return {"shape": shape, "threads": threads, "pruned": pruned, "rounds": rounds, "rows": found}


def print_pruned_header(pruned: float) -> None:
    columns = (
        "shape, threads | MACs | runtime, precision | dense ms | pruned ms | wall ratio | processor ratio | faster"
    )
    print(f"\n{pruned:.0%} of MLP, Q/K and V/O removed; medians, paired ratios with their 95 % interval\n")
    print(f"| {columns} |\n" + "|---" * 8 + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(DEIT))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pruned", type=float, default=0.0, help="fraction removed; dense beside pruned, no peers")
    parser.add_argument("--peers", type=Path, help="folder that keeps the peers' files between runs")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    packages = ("torch", "onnxruntime", "openvino", "nncf")
    device = fingerprint({package: version(package) for package in packages})
    print(json.dumps(device))
    with tempfile.TemporaryDirectory() as temporary:
        peers = options.peers or Path(temporary)
        given = [(shape, threads) for shape in options.shapes for threads in options.threads]
        if options.pruned > 0:
            print_pruned_header(options.pruned)
            results = [measure_pruned(shape, threads, options.rounds, options.pruned) for shape, threads in given]
        else:
            results = [measure(shape, threads, options.rounds, peers) for shape, threads in given]
    if options.json:
        options.json.write_text(json.dumps({"device": device, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
