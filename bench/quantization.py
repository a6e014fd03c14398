"""Accuracy after quantization: ours, stage by stage, beside ONNX Runtime's quantize_static and NNCF, on one trained model.

    python bench/quantization.py [MODEL] [--data D] [--eval E] [--images 500] [--rows ours ort nncf]
        [--precisions w8a8 w6a6 w4a8] [--stages search ...] [--json FILE]

Every contestant gets the same float network and the same calibration images. Theirs start from our float ONNX graph, which
uses standard operators only, and run in their own runtime; ours run as the torch simulation, which a test holds against
the ONNX graphs to one quantization step. Each row is a process of its own, so that peak memory is its own; time is that of
calibration alone. `kl` is the mean divergence from the float prediction, the only column that 2,000 images measure finely.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

from calibration import data
from calibration.observe import ObservePlan, observe
from compressor import checkpoint
from compressor.intervals import proportion_interval
from compressor.lower import lower
from compressor.quantize import QuantizeConfig, quantize, simulate
from compressor.quantize.importance import token_importance
from compressor.quantize.refine import RefineConfig, refine
from compressor.quantize.rounding import nearest, second_order
from compressor.quantize.search import Found, Objective
from compressor.types import Array, Capabilities, Model, Precision
from compressor.vit import to_torch

PLAIN = Capabilities(layout="tokens", opset=20, precisions=("fp32",))
Predict = Callable[[Array], Array]
STAGES = ("min-max", "search", "+ zero point", "+ bias", "+ rounding", "+ compensation", "+ token weights")


@dataclass(frozen=True, eq=False)
class Task:
    """The float model and the preprocessed images, the same for every row."""

    model: Model
    calibration: Array  # (n, C, h, w)
    evaluation: Array
    labels: Array | None
    reference: Array  # (m, classes) float logits

    def batches(self, size: int = 50) -> list[Array]:
        return [self.calibration[i : i + size] for i in range(0, len(self.calibration), size)]


def minmax(objective: Objective, scale: Array) -> Found:
    return Found(scale, objective(scale), 1)


# --------------------------------------------------------------------------- contestants


def ours(task: Task, precision: Precision, stage: str) -> Predict:
    asymmetric = () if stage in ("min-max", "search") else ("fc2",)
    grid = QuantizeConfig(precision, asymmetric=asymmetric)
    if stage in STAGES[:3]:
        stats = observe(to_torch(task.model), task.batches(), ObservePlan(moments=(), pair_energy=False))
        found = QuantizeConfig(precision, search=minmax) if stage == "min-max" else grid
        return torch_predict(simulate(task.model, quantize(task.model, stats, found)))
    weights = token_importance(to_torch(task.model), task.batches()[:2]) if stage == "+ token weights" else {}
    dampings = RefineConfig().dampings if stage in STAGES[5:] else ()
    config = RefineConfig(grid, dampings, nearest if stage == "+ bias" else second_order)
    result = refine(task.model, task.batches(), config, weights)
    return torch_predict(simulate(result.model, result.quantization))


def torch_predict(forward: Callable[[torch.Tensor], torch.Tensor]) -> Predict:
    def predict(pixels: Array) -> Array:
        with torch.inference_mode():
            return forward(torch.from_numpy(pixels)).numpy()

    return predict


def float_file(task: Task, folder: Path) -> str:
    path = folder / "float.onnx"
    path.write_bytes(onnx_ir.to_proto(lower(task.model, PLAIN)).SerializeToString())
    return str(path)


def ort_static(task: Task, folder: Path, method: str, *, per_channel: bool) -> Predict:
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
    return lambda pixels: np.asarray(session.run(None, {name: pixels})[0])


def nncf_transformer(task: Task, folder: Path) -> Predict:
    import nncf
    import openvino

    images = nncf.Dataset([task.calibration[i : i + 1] for i in range(len(task.calibration))])
    found = nncf.quantize(
        openvino.Core().read_model(float_file(task, folder)),
        images,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(task.calibration),
    )
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.Core().compile_model(found, "CPU", config)
    return lambda pixels: np.asarray(compiled(pixels)[0])


# --------------------------------------------------------------------------- rows


def rows(
    task: Task, folder: Path, wanted: Iterable[str], precisions: Iterable[Precision], stages: Iterable[str]
) -> dict[tuple[str, str], Callable[[], Predict]]:
    table: dict[tuple[str, str], Callable[[], Predict]] = {}
    if "ort" in wanted:
        for label, method, channel in (
            ("quantize_static, default", "MinMax", False),
            ("quantize_static, per channel", "MinMax", True),
            ("quantize_static, percentile", "Percentile", True),
            ("quantize_static, entropy", "Entropy", True),
        ):
            table["w8a8", f"ORT {label}"] = lambda m=method, c=channel: ort_static(task, folder, m, per_channel=c)
    if "nncf" in wanted:
        table["w8a8", "NNCF TRANSFORMER"] = lambda: nncf_transformer(task, folder)
    if "ours" in wanted:
        for precision in precisions:
            for stage in stages:
                table[precision, f"ours {stage}"] = lambda p=precision, s=stage: ours(task, p, s)
    return table


def measure(task: Task, make: Callable[[], Predict]) -> dict[str, Any]:
    start = time.perf_counter(), time.process_time()
    predict = make()
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    logits = np.concatenate([predict(task.evaluation[i : i + 50]) for i in range(0, len(task.evaluation), 50)])
    return {**score(logits, task), "calibration_s": wall, "calibration_cpu_s": cpu, "peak_mb": peak}


def score(logits: Array, task: Task) -> dict[str, Any]:
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(1).numpy() for x in (task.reference, logits))
    right, same = logits.argmax(1), int((logits.argmax(1) == task.reference.argmax(1)).sum())
    found: dict[str, Any] = {
        "agreement": 100 * same / len(logits),
        "flips": len(logits) - same,
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
    }
    if task.labels is not None:
        correct = int((right == task.labels).sum())
        found |= {
            "top1": 100 * correct / len(logits),
            "top1_ci95": [100 * b for b in proportion_interval(correct, len(logits))],
        }
    return found


def child(task: Task, make: Callable[[], Predict], pipe: Any) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.send(measure(task, make))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--eval", default="demo:eval")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rows", nargs="+", choices=("ours", "ort", "nncf"), default=("ours", "ort", "nncf"))
    parser.add_argument("--precisions", nargs="+", default=("w8a8", "w6a6", "w4a8"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = checkpoint.load(args.model)
    calibration, evaluation = data.open_images(args.data, limit=args.images), data.open_images(args.eval)
    pixels, held_out = (np.concatenate(list(data.batches(s, model.preprocess, 50))) for s in (calibration, evaluation))
    labels = (
        data.match_labels(evaluation, model.labels, model.spec.num_classes) if evaluation.labels is not None else None
    )
    predict = torch_predict(to_torch(model))
    reference = np.concatenate([predict(held_out[i : i + 50]) for i in range(0, len(held_out), 50)])
    task, results = Task(model, pixels, held_out, labels, reference), []
    print(f"float: {score(reference, task)}", flush=True)
    print("| bits | method | top-1 (95 %) | agreement | flips | KL | calibration s (cpu) | peak MB |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        table = rows(task, Path(folder), args.rows, args.precisions, args.stages)
        for (precision, name), make in table.items():
            context = multiprocessing.get_context("fork")
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(task, make, send))
            process.start()
            send.close()
            try:
                found = receive.recv()
            except EOFError:
                found = None
            process.join()
            results.append({"precision": precision, "method": name, **(found or {"failed": True})})
            print(line(results[-1]), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(results, indent=1))


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['precision']} | {row['method']} | failed | | | | | |"
    low, high = row.get("top1_ci95", (0, 0))
    accuracy = f"{row['top1']:.2f} ({low:.2f}-{high:.2f})" if "top1" in row else "-"
    cost = f"{row['calibration_s']:.1f} ({row['calibration_cpu_s']:.1f}) | {row['peak_mb']:.0f}"
    return (
        f"| {row['precision']} | {row['method']} | {accuracy} | {row['agreement']:.2f} | {row['flips']} "
        f"| {row['kl']:.2e} | {cost} |"
    )


if __name__ == "__main__":
    main()
