"""Accuracy after quantization: ours, stage by stage, beside ONNX Runtime's quantize_static and NNCF, on one trained model.

    python bench/quantization.py [MODEL] [--data D] [--eval E] [--images 500] [--rows ours ort nncf nncf-control]
        [--precisions w8a8 w6a6 w4a8] [--stages search ...] [--pruned 0.5] [--outliers 32] [--rounds 100] [--markdown FILE]
        [--json FILE]

Every contestant gets the same float network and the same calibration images. Theirs start from our float ONNX graph, which
uses standard operators only, and run in their own runtime; ours run as the torch simulation, which a test holds against
the ONNX graphs to one quantization step. Each row is a process of its own, so that peak memory is its own; time is that of
calibration alone. `kl` is the mean divergence from the float prediction, the only column that 2,000 images measure finely.
"+ equalisation" is what `compress` does. "low-rank branch" is TAPTQ's compensation as published, "low-rank budget" the same
for the branches that gain most, in simulation only: no file holds them. "int8 scores" is "+ token weights" with q k^T in
integers too, where a target races that. With --pruned R the model is pruned first (obs) and rows are held against the
unpruned model. With --outliers N four channels behind every norm are N times as large, and the weights that read them N
times as small: the same function in float.
"+ selection" calibrates on 128 images picked by `coarse_to_fine`, "128 random" on as many random ones.

Latency is measured last: one process, one thread, batch 1, files in a new order every round; the best is shown.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from trial import Trial, arguments, in_batches, open_trial, score, turns

import targets
from calibration.observe import ObservePlan, observe
from calibration.select import Selector, coarse_to_fine, features, random
from compressor.lower import lower
from compressor.prune import ObsConfig, prune
from compressor.quantize import QuantizeConfig, quantize, simulate
from compressor.quantize.compensate import Budget, LowRankConfig, Threshold, low_rank, truncate_plain
from compressor.quantize.equalize import EXPONENTS, fold
from compressor.quantize.importance import token_importance
from compressor.quantize.refine import RefineConfig, refine
from compressor.quantize.rounding import nearest, second_order
from compressor.quantize.search import Found, Objective
from compressor.quantize.simulate import fake_quant_tap, on_grid
from compressor.types import Array, BuildOptions, Capabilities, Model, Precision, Quantization
from compressor.vit import to_torch

RUNTIMES = ("ort", "openvino")
PLAIN = Capabilities(layout="tokens", opset=20, precisions=("fp32",))
Predict = Callable[[Array], Array]
STAGES = (
    "min-max",
    "search",
    "search, low-rank branch",
    "search, low-rank budget",
    "+ zero point",
    "+ bias",
    "+ rounding",
    "+ compensation",
    "+ token weights",
    "+ equalisation",
    "int8 scores",
    "128 random",
    "+ selection",
)
FEW = 128
OUTLIERS = 4
EXTRA_MACS = 0.02  # that "low-rank budget" may spend
MAX_DROP = 0.002  # of calibration images that NNCF's accuracy control may let change their class


@dataclass(frozen=True, eq=False)
class Task(Trial):
    """The same for every row; `small` is what gets quantized, the model itself where nothing was pruned."""

    small: Model


@dataclass(frozen=True, eq=False)
class Made:
    """What a contestant hands in: logits of pixels, and the files it would ship, by runtime."""

    predict: Predict
    files: dict[str, Path]


def smaller(trial: Trial, ratio: float) -> Model:
    config = ObsConfig(ratio, ratio, ratio)
    return (
        prune(trial.model, trial.batches, config, partial(observe, plan=ObservePlan())).model if ratio else trial.model
    )


def outlying(model: Model, by: float) -> Model:
    """The same function in float, with `OUTLIERS` channels behind every norm `by` times as large."""
    module, width, rng = to_torch(model), model.spec.embed_dim, np.random.default_rng(0)
    for i, block in enumerate(model.spec.blocks):
        mlp = ("fc1", "gate") if block.mlp == "swiglu" else ("fc1",)
        for norm, readers in (("norm1", ("q", "k", "v")), ("norm2", mlp)):
            factor = np.ones(width, np.float32)
            factor[rng.choice(width, OUTLIERS, replace=False)] = 1 / by
            fold(module, f"blocks.{i}.{norm}", [f"blocks.{i}.{reader}" for reader in readers], factor)
    return model.with_weights(model.spec, {name: p.numpy() for name, p in module.state_dict().items()})


def minmax(objective: Objective, scale: Array) -> Found:
    return Found(scale, objective(scale), 1)


# --------------------------------------------------------------------------- contestants


def ours(task: Task, folder: Path, precision: Precision, stage: str) -> Made:
    plain = stage == "min-max" or stage.startswith("search")
    grid = QuantizeConfig(precision, asymmetric=() if plain else ("fc2", "patch"))
    if plain or stage == "+ zero point":
        stats = observe(to_torch(task.small), task.batches(), ObservePlan(moments=(), pair_energy=False))
        found = QuantizeConfig(precision, search=minmax) if stage == "min-max" else grid
        plan = quantize(task.small, stats, found)
        gates: dict[str, Threshold | Budget] = {"branch": Threshold(), "budget": Budget(EXTRA_MACS)}
        gate = gates.get(stage.rpartition(" ")[2])
        return hand_in(task.small, plan, folder) if gate is None else with_branches(task, plan, gate)
    if stage in ("128 random", "+ selection"):
        task = replace(task, calibration=few(task, coarse_to_fine if stage == "+ selection" else random))
    weighed = stage not in ("+ bias", "+ rounding", "+ compensation")
    weights = token_importance(to_torch(task.small), task.batches()[:2]) if weighed else {}
    dampings = () if stage in ("+ bias", "+ rounding") else RefineConfig().dampings
    exponents = EXPONENTS if stage == "+ equalisation" else ()
    config = RefineConfig(grid, dampings, nearest if stage == "+ bias" else second_order, exponents=exponents)
    result = refine(task.small, task.batches(), config, weights)
    if stage == "int8 scores":
        return hand_in(result.model, result.with_scores(), folder, [n for n in RUNTIMES if int8_scores(n)])
    return hand_in(result.model, result.quantization, folder)


def int8_scores(runtime: str) -> bool:
    return targets.get(runtime).CAPABILITIES.int8_scores


def with_branches(task: Task, plan: Quantization, gate: Threshold | Budget) -> Made:
    found = low_rank(task.small, plan, task.batches(), LowRankConfig(gate=gate, truncate=truncate_plain))
    module, inner = to_torch(on_grid(task.small, plan.weights)), fake_quant_tap(plan.activations)
    return Made(torch_predict(lambda pixels: module(pixels, found.tap(inner))), {})


def few(task: Task, selector: Selector) -> Array:
    known = features(to_torch(task.small), task.batches())
    return task.calibration[selector(known, min(FEW, len(known)), np.random.default_rng(0))]


def hand_in(model: Model, plan: Quantization, folder: Path, runtimes: Iterable[str] = RUNTIMES) -> Made:
    files = {}
    for name in runtimes:
        target = targets.get(name)
        files[name] = target.build(lower(model, target.CAPABILITIES, plan), BuildOptions(folder / name, "w8a8")).path
    return Made(torch_predict(simulate(model, plan)), files)


def torch_predict(forward: Callable[[torch.Tensor], torch.Tensor]) -> Predict:
    def predict(pixels: Array) -> Array:
        with torch.inference_mode():
            return forward(torch.from_numpy(pixels)).numpy()

    return predict


def float_file(task: Task, folder: Path) -> str:
    path = folder / "float.onnx"
    path.write_bytes(onnx_ir.to_proto(lower(task.small, PLAIN)).SerializeToString())
    return str(path)


def ort_static(task: Task, folder: Path, method: str, *, per_channel: bool) -> Made:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    source = float_file(task, folder)
    name = onnxruntime.InferenceSession(source).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(task.batches())

        def get_next(self) -> dict[str, Array] | None:
            pixels = next(self.left, None)
            return None if pixels is None else {name: pixels}

    target = str(folder / "int8.onnx")
    quantize_static(source, target, Reader(), per_channel=per_channel, calibrate_method=CalibrationMethod[method])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(target, options)
    return Made(lambda pixels: np.asarray(session.run(None, {name: pixels})[0]), {"ort": Path(target)})


def nncf_transformer(task: Task, folder: Path, *, controlled: bool) -> Made:
    """With `controlled`, NNCF returns layers to float until the float model's classes of the calibration images are kept."""
    import nncf
    import openvino

    model = openvino.Core().read_model(float_file(task, folder))
    images = nncf.Dataset([task.calibration[i : i + 1] for i in range(len(task.calibration))])
    common = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(task.calibration)}
    if controlled:
        predict = torch_predict(to_torch(task.small))
        pairs = nncf.Dataset([(x[None], int(predict(x[None]).argmax())) for x in task.calibration])

        def agreement(compiled: Any, data: Iterable[tuple[Array, int]]) -> tuple[float, list[float]]:
            same = [float(np.asarray(compiled(x)[0]).argmax() == y) for x, y in data]
            return float(np.mean(same)), same

        found = nncf.quantize_with_accuracy_control(model, images, pairs, agreement, max_drop=MAX_DROP, **common)
    else:
        found = nncf.quantize(model, images, **common)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.Core().compile_model(found, "CPU", config)
    openvino.save_model(found, folder / "nncf.xml", compress_to_fp16=False)
    return Made(lambda pixels: np.asarray(compiled(pixels)[0]), {"openvino": folder / "nncf.xml"})


# --------------------------------------------------------------------------- rows


def rows(
    task: Task, wanted: Iterable[str], precisions: Iterable[Precision], stages: Iterable[str]
) -> dict[tuple[str, str], Callable[[Path], Made]]:
    table: dict[tuple[str, str], Callable[[Path], Made]] = {}
    if "ort" in wanted:
        for label, method, channel in (
            ("quantize_static, default", "MinMax", False),
            ("quantize_static, per channel", "MinMax", True),
            ("quantize_static, percentile", "Percentile", True),
            ("quantize_static, entropy", "Entropy", True),
        ):
            table["w8a8", f"ORT {label}"] = partial(ort_static, task, method=method, per_channel=channel)
    if "nncf" in wanted:
        table["w8a8", "NNCF TRANSFORMER"] = partial(nncf_transformer, task, controlled=False)
    if "nncf-control" in wanted:
        table["w8a8", "NNCF, accuracy control"] = partial(nncf_transformer, task, controlled=True)
    if "ours" in wanted:
        for precision in precisions:
            for stage in stages:
                table[precision, f"ours {stage}"] = partial(ours, task, precision=precision, stage=stage)
    return table


def measure(task: Task, make: Callable[[Path], Made], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    start = time.perf_counter(), time.process_time()
    made = make(folder)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    logits = in_batches(made.predict, task.evaluation)
    homes = [path.parent for path in made.files.values()][:1]
    size = sum(f.stat().st_size for home in homes for f in home.iterdir() if "float" not in f.name)
    cost = {"calibration_s": wall, "calibration_cpu_s": cpu, "peak_mb": peak, "size_mb": size / 1e6}
    return {**score(logits, task), **cost, "files": {runtime: str(path) for runtime, path in made.files.items()}}


def child(task: Task, make: Callable[[Path], Made], folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # their advice to pre-process a graph that is emitted clean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.send(measure(task, make, folder))


def in_a_process(task: Task, make: Callable[[Path], Made], folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(task, make, folder, send))
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        found = {"failed": True}
    process.join()
    return found


# --------------------------------------------------------------------------- latency


def ort_session(path: str) -> Callable[[Array], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})


def openvino_session(path: str) -> Callable[[Array], Any]:
    """With OpenVINO's own default between the integers, which is bf16 where the processor has it."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([1, *[d.get_length() for d in model.inputs[0].get_partial_shape()[1:]]])
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "1"}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda pixels: request.infer({0: pixels}, share_inputs=True)


def race(results: list[dict[str, Any]], pixels: Array, rounds: int) -> None:
    """Adds ``ort_ms`` and ``openvino_ms``, the best of `rounds`, to every result that has such a file."""
    openers = {"ort": ort_session, "openvino": openvino_session}
    entries = [(row, runtime, openers[runtime](path)) for row in results for runtime, path in row["files"].items()]
    best = 1e3 * turns([session for _, _, session in entries], pixels, rounds)[..., 0].min(0)
    for (row, runtime, _), ms in zip(entries, best.tolist(), strict=True):
        row[f"{runtime}_ms"] = ms


# --------------------------------------------------------------------------- the table


def main() -> None:
    parser = arguments(__doc__, images=500)
    parser.add_argument(
        "--rows", nargs="+", choices=("ours", "ort", "nncf", "nncf-control"), default=("ours", "ort", "nncf")
    )
    parser.add_argument("--precisions", nargs="+", default=("w8a8", "w6a6", "w4a8"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--pruned", type=float, default=0.0, help="fraction of every width removed first")
    parser.add_argument(
        "--outliers", type=float, default=1.0, help="how much larger four channels behind every norm are made"
    )
    parser.add_argument("--rounds", type=int, default=100, help="of the latency race; 0 leaves it out")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trial = open_trial(options)
    task, results = Task(**vars(trial), small=outlying(smaller(trial, options.pruned), options.outliers)), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = rows(task, options.rows, options.precisions, options.stages)
        for number, ((precision, name), make) in enumerate(table.items()):
            found = in_a_process(task, make, folder / str(number))
            results.append({"precision": precision, "method": name, **found})
            print(line(results[-1]), flush=True)
        raced = [r for r in results if "failed" not in r and r["precision"] == "w8a8"]
        if options.rounds and raced:
            race(raced, task.calibration[:1], options.rounds)
    for row in results:
        row.pop("files", None)
    top1 = score(trial.reference, trial).get("top1", float("nan"))
    head = f"float: top-1 {top1:.2f}; {len(trial.evaluation)} images, {len(trial.calibration)} for calibration"
    text = "\n".join([head, "", *HEADER, *map(line, results)])
    print(f"\n{text}")
    if options.markdown is not None:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


HEADER = (
    "| bits | method | top-1 (95 %) | agreement | flips | KL | calibration s (cpu) | peak MB | size MB | ORT ms | OpenVINO ms |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['precision']} | {row['method']} | failed |" + " |" * 8
    low, high = row.get("top1_ci95", (0, 0))
    accuracy = f"{row['top1']:.2f} ({low:.2f}-{high:.2f})" if "top1" in row else "-"
    cost = f"{row['calibration_s']:.1f} ({row['calibration_cpu_s']:.1f}) | {row['peak_mb']:.0f} | {row['size_mb']:.2f}"
    times = " | ".join(f"{row[k]:.2f}" if k in row else "" for k in ("ort_ms", "openvino_ms"))
    return (
        f"| {row['precision']} | {row['method']} | {accuracy} | {row['agreement']:.2f} | {row['flips']} "
        f"| {row['kl']:.2e} | {cost} | {times} |"
    )


if __name__ == "__main__":
    main()
