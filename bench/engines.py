"""What TensorRT's parser and builder make of vitrim's graphs, layer by layer: no GPU is needed, and nothing is timed on one.

    python bench/engines.py [--tables families chips shapes peers] [--chip SM89] [--modelopt PYTHON] [--images 2000] [--out FILE]

Every graph is built by TensorRT-RTX (`vitrim doctor --install tensorrt-rtx`) for a chip that need not be here, and the
builder's own layer table is read back.

    families   two blocks of every checkpoint family, precision and pruning level; each plan is made twice and compared
    chips      one network for every chip the builder knows; what it refuses is the chip's, not the graph's
    shapes     whole networks, dense and half: kernels, size, seconds of the builder
    peers      the embedded model, quantized by vitrim and by NVIDIA ModelOpt's ONNX PTQ from the same float graph on the same
               calibration images; agreement with float on evaluation images, each graph run by ONNX Runtime's CPU.
               --modelopt names the Python of an environment with nvidia-modelopt[onnx]; without it its rows are left out

A cell is "products by the type they read; kernels". Weights of the first three tables are random.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
from gpu import MODELS, grids, plain, random_model, shrink

from calibration import data
from compressor import checkpoint
from compressor.errors import VitrimError
from compressor.intervals import proportion_interval
from compressor.lower import lower
from compressor.quantize.importance import token_importance
from compressor.quantize.plan import for_target
from compressor.quantize.refine import RefineConfig, refine
from compressor.stages import torch_logits
from compressor.types import Array, Artifact, BuildOptions, Model, Precision, VitSpec, Width
from compressor.vit import to_torch
from targets import _tensorrt, _venv, trt_rtx

SETTINGS = {"package": trt_rtx.PACKAGE, "timing_cache": "", "portable": ""}
CHIPS = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
WIDTHS: dict[str, Width] = {"w8a8": 8, "fp8": "e4m3"}
PRECISIONS = trt_rtx.CAPABILITIES.precisions


def of(spec: VitSpec, **changes: object) -> VitSpec:
    return replace(spec, blocks=tuple(replace(block, **changes) for block in spec.blocks))  # type: ignore[arg-type]


TINY, BASE = plain(192, 3, 2), plain(768, 12, 2)
FAMILIES = {
    "DeiT-Tiny": TINY,
    "DeiT-Tiny distilled": replace(TINY, prefix_tokens=2, pool="token_dist"),
    "MAE base": replace(BASE, pool="avg", norm_after_pool=True),
    "DINOv2 small, 4 registers, SwiGLU": replace(
        of(plain(384, 6, 2, 14), mlp="swiglu"), prefix_tokens=5, pool="token_avg", num_classes=0
    ),
    "CLIP base": of(BASE, mlp="quick_gelu"),
    "SigLIP so400m": replace(of(plain(1152, 16, 2, 14), mlp="gelu_tanh", mlp_dim=4304), prefix_tokens=0, pool="avg"),
    "q/k norm": of(TINY, qk_norm=True),
    "210 x 308, patch 14 x 28": replace(TINY, image_size=(210, 308), patch_size=(14, 28)),
}


def uneven(spec: VitSpec) -> VitSpec:
    """Another width in every block, none a multiple of anything."""
    shares = ((0.6, 0.7, 0.9), (0.4, 0.55, 0.45))

    def odd(width: int, share: float) -> int:
        return int(width * share) | 1

    blocks = (
        replace(b, mlp_dim=odd(b.mlp_dim, m), qk_dim=odd(b.qk_dim, q), v_dim=odd(b.v_dim, v))
        for b, (m, q, v) in zip(spec.blocks, shares, strict=True)
    )
    return replace(spec, blocks=tuple(blocks))


LEVELS = {"dense": partial(shrink, mlp=0, qk=0, v=0), "50 %": partial(shrink, mlp=0.5, qk=0.5, v=0), "uneven": uneven}


# --------------------------------------------------------------------------- building


@contextmanager
def builder() -> Iterator[_tensorrt.Call]:
    """One process of the vendor's environment for all builds."""
    if not _venv.availability(trt_rtx.RECIPE).available:
        raise SystemExit("TensorRT-RTX must be installed: vitrim doctor --install tensorrt-rtx")
    with (
        tempfile.TemporaryDirectory() as folder,
        _venv.Worker(trt_rtx.RECIPE, trt_rtx.WORKER, Path(folder) / "log") as worker,
    ):
        yield worker.call


def build(call: _tensorrt.Call, model: Model, precision: Precision, chip: str, folder: Path) -> Artifact:
    """The engine of `model`; its plan is made twice, and differing bytes end the run."""
    plans = []
    for name in ("first", "second"):
        graph = lower(model, trt_rtx.CAPABILITIES, grids(model, WIDTHS[precision]) if precision in WIDTHS else None)
        plans.append(trt_rtx.plan(graph, BuildOptions(folder, precision, name, chip=chip)))
    if plans[0].sha256 != plans[1].sha256:
        raise SystemExit(f"{precision}: a plan must replay to the same bytes.")
    return _tensorrt.build_engine(plans[0], folder, SETTINGS, call)


def cell(found: Mapping[str, str]) -> str:
    return f"{found['products']}; {found['kernels']}"


def families(call: _tensorrt.Call, chip: str) -> Iterator[str]:
    yield f"\n## Every family, precision and pruning level, two blocks, {chip}\n"
    yield f"| family | widths | {' | '.join(PRECISIONS)} |\n{'|---' * (2 + len(PRECISIONS))}|"
    total: Counter[str] = Counter()
    for (family, whole), (level, cut) in ((f, v) for f in FAMILIES.items() for v in LEVELS.items()):
        spec, cells = cut(whole), []
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                found = build(call, random_model(spec), precision, chip, Path(folder)).settings
            cells.append(cell(found))
            numbers = {k: int(found[k]) for k in ("typed_layers", "foreign_types", "added_casts", "conversions")}
            total.update(numbers | {"engines": 1})
            if precision != "fp32":
                total.update(blocks=len(spec.blocks), fused=int(found["fused_attention"]))
        yield f"| {family} | {level} | {' | '.join(cells)} |"
    yield (
        f"\n{total['engines']} of {total['engines']} graphs parsed and built, each from a plan that was made twice and had the "
        f"same bytes. Of {total['typed_layers']} float layers {total['foreign_types']} have another type than asked for; the "
        f"parser added {total['added_casts']} casts, and {total['conversions']} kernels only convert. Attention is one kernel "
        f"in {total['fused']} of {total['blocks']} blocks (fp32 has no such kernel)."
    )


def chips(call: _tensorrt.Call) -> Iterator[str]:
    yield f"\n## Chips: DeiT-Tiny, two blocks\n\n| chip | {' | '.join(PRECISIONS)} |\n{'|---' * (1 + len(PRECISIONS))}|"
    for chip in CHIPS:
        cells = []
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    made = build(call, random_model(TINY), precision, chip, Path(folder)).settings
                    cells.append(f"{cell(made)}; {made['fused_attention']} fused")
                except VitrimError as error:
                    cells.append(refusal(error))
        yield f"| {chip} | {' | '.join(cells)} |"


def refusal(error: Exception) -> str:
    reason = re.search(r"HW-specific datatypes: \w+|must be SM\d+ or later", str(error))
    return f"refused: {reason[0] if reason else error}"


def shapes(call: _tensorrt.Call, chip: str) -> Iterator[str]:
    yield f"\n## Whole networks, {chip}\n"
    yield "| model | widths | precision | products; kernels | fused | engine MB | build s |\n|---|---|---|---|---|---|---|"
    for name in ("deit-tiny", "deit-small", "deit-base"):
        for level in ("dense", "50 %"):
            model = random_model(LEVELS[level](MODELS[name]))
            for precision in ("fp16", "w8a8", "fp8"):
                with tempfile.TemporaryDirectory() as folder:
                    started = time.perf_counter()
                    made = build(call, model, precision, chip, Path(folder))
                    spent = time.perf_counter() - started
                    size = made.path.stat().st_size / 1e6
                fused = f"{made.settings['fused_attention']} of {len(model.spec.blocks)}"
                yield f"| {name} | {level} | {precision} | {cell(made.settings)} | {fused} | {size:.1f} | {spent:.1f} |"


# --------------------------------------------------------------------------- peers


def onnx_runtime(file: Path, pixels: Array) -> Array:
    """Logits of ONNX Runtime's CPU, which executes Q and DQ as they are written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"pixels": pixels[i : i + 100]})[0] for i in range(0, len(pixels), 100)])


def images(source: str, model: Model, count: int) -> Array:
    return np.concatenate(list(data.batches(data.open_images(source, limit=count, seed=0), model.preprocess, 64)))


def ours(model: Model, pixels: Array, precision: Precision, folder: Path) -> Path:
    """What `vitrim compress` puts into a plan: refined on the calibration images, a few of them for token importance."""
    batches = [pixels[i : i + 16] for i in range(0, len(pixels), 16)]
    importance = token_importance(to_torch(model), batches[:2])
    refined = refine(model, batches, RefineConfig(for_target(trt_rtx.CAPABILITIES, precision)), importance)
    graph = lower(refined.model, trt_rtx.CAPABILITIES, refined.quantization)
    return trt_rtx.plan(graph, BuildOptions(folder, precision, f"ours-{precision}")).path


def modelopt(python: str, model: Model, pixels: Array, precision: Precision, folder: Path) -> Path:
    """The same float graph through ModelOpt's command with its defaults, calibrated on the CPU."""
    source, calibration, made = folder / "float.onnx", folder / "calibration.npz", folder / f"modelopt-{precision}.onnx"
    source.write_bytes(onnx_ir.to_proto(lower(model, trt_rtx.CAPABILITIES)).SerializeToString(deterministic=True))
    np.savez(calibration, pixels=pixels)
    mode = {"w8a8": "int8", "fp8": "fp8"}[precision]
    options = ["--quantize_mode", mode, "--calibration_data_path", str(calibration), "--calibration_eps", "cpu"]
    command = [python, "-m", "modelopt.onnx.quantization", "--onnx_path", str(source), "--output_path", str(made)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ModelOpt failed: {done.stderr[-500:]}")
    return made


def peers(call: _tensorrt.Call, chip: str, python: str | None, count: int) -> Iterator[str]:
    model = checkpoint.load("demo")
    calibration, evaluation = images("demo", model, 512), images("demo:eval", model, count)
    expected = torch_logits(model, evaluation)
    yield f"\n## The embedded model beside ModelOpt, {chip}\n"
    yield f"{len(calibration)} calibration images, {len(evaluation)} evaluation images, {len(model.spec.blocks)} blocks.\n"
    columns = ("", "agreement with float %", "95 %", "KL", "products; kernels", "fused", "only convert", "file MB", "s")
    yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    makers = {"vitrim": ours} | ({"ModelOpt": partial(modelopt, python)} if python else {})
    for precision in WIDTHS:
        for who, make in makers.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                file = make(model, calibration, precision, Path(folder))
                spent = time.perf_counter() - started
                score = judged(expected, onnx_runtime(file, evaluation))
                found = peer_engine(call, file, model.spec, precision, chip)
                size = file.stat().st_size / 1e6
            engine = f"{cell(found)} | {found['fused_attention']} | {found['conversions']}"
            yield f"| {who} {precision} | {score} | {engine} | {size:.1f} | {spent:.0f} |"
    if not python:
        yield "\nModelOpt's rows are left out: --modelopt names no Python that has it."


def judged(expected: Array, got: Array) -> str:
    same = int((expected.argmax(1) == got.argmax(1)).sum())
    low, high = proportion_interval(same, len(got))
    a, b = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (expected.astype(np.float64), got.astype(np.float64)))
    return (
        f"{100 * same / len(got):.2f} | {100 * low:.2f} to {100 * high:.2f} | {(np.exp(a) * (a - b)).sum(1).mean():.2e}"
    )


def peer_engine(call: _tensorrt.Call, file: Path, spec: VitSpec, precision: Precision, chip: str) -> dict[str, str]:
    """Findings about the engine of any graph with vitrim's input."""
    shapes = _tensorrt.batch_shapes((-1, spec.in_chans, *spec.image_size), 1)
    where = {"onnx": str(file), "engine": str(file.with_suffix(".engine")), "input": "pixels", "shapes": shapes}
    return _tensorrt.findings(call("build", {**where, "chip": chip, **SETTINGS}, {})[0], precision)


# --------------------------------------------------------------------------- report


def report(options: argparse.Namespace, call: _tensorrt.Call) -> Iterator[str]:
    yield f"`{' '.join(sys.argv)}`, TensorRT-RTX {trt_rtx.RELEASE}, no GPU."
    tables = {
        "families": lambda: families(call, options.chip),
        "chips": lambda: chips(call),
        "shapes": lambda: shapes(call, options.chip),
        "peers": lambda: peers(call, options.chip, options.modelopt, options.images),
    }
    for name in options.tables:
        yield from tables[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("families", "chips", "shapes", "peers")
    parser.add_argument("--tables", nargs="+", choices=names, default=names)
    parser.add_argument("--chip", default="SM89")
    parser.add_argument("--modelopt", metavar="PYTHON", help="a Python that has nvidia-modelopt[onnx]")
    parser.add_argument("--images", type=int, default=2000, help="evaluation images of the last table, at most")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args()
    lines = []
    with builder() as call:
        for line in report(options, call):
            print(line, flush=True)
            lines.append(line)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
