"""Weights alone in 8 and 4 bits: ours beside NNCF's `compress_weights`, on one trained model.

    python bench/weights.py [MODEL] [--data D] [--eval E] [--images 500] [--rounds 200]

Ours are refined on the calibration images; NNCF reads none (on the embedded model NNCF 3.4.0 refuses `gptq`, and
`scale_estimation` leaves chance accuracy). Each artifact is evaluated by its own runtime, with float activations in all of
them: OpenVINO's rounding of the inputs of packed weights is off. Latency is a median relative to the float artifact of the
same runtime, one thread and batch 1, from one run in which every artifact takes its turn in each round, in a new order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from trial import Trial, arguments, in_batches, open_trial, score, turns

import targets
from compressor.candidates import build
from compressor.lower import lower
from compressor.profile import faster
from compressor.quantize import QuantizeConfig
from compressor.quantize.importance import token_importance
from compressor.quantize.plan import GROUP
from compressor.quantize.refine import RefineConfig, refine
from compressor.types import WEIGHT_ONLY, Array, BuildOptions, Capabilities, Model, Precision
from compressor.vit import to_torch

RUNTIMES = ("ort", "openvino")
PLAIN = Capabilities(layout="tokens", opset=20, precisions=("fp32",))
Run = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Row:
    """An opened artifact; the float one of its runtime is what its latency is relative to."""

    precision: str
    method: str
    runtime: str
    size_bytes: int
    run: Run


def ours(trial: Trial, precision: Precision, folder: Path) -> list[Row]:
    """One row per runtime, of the refined model or, for fp32, of the model itself."""
    small, grids = trial.model, None
    if precision in WEIGHT_ONLY:
        importance = token_importance(to_torch(trial.model), trial.batches()[:1])
        refined = refine(trial.model, trial.batches(), RefineConfig(QuantizeConfig(precision)), importance)
        small, grids = refined.model, refined.quantization
    rows = []
    for name in RUNTIMES:
        artifact = build(small, name, BuildOptions(folder / name, precision, precision), grids)
        session = targets.get(name).open(artifact)
        rows.append(
            Row(precision, "ours", name, artifact.size_bytes, lambda x, s=session: s.run({"pixels": x})["logits"])
        )
    return rows


def nncf_weights(model: Model, precision: Precision, folder: Path) -> Row:
    import nncf
    import openvino

    modes, core = nncf.CompressWeightsMode, openvino.Core()
    how = {"mode": modes.INT8_SYM}
    if precision == "w4a32":
        how = {"mode": modes.INT4_SYM, "group_size": GROUP, "ratio": 1.0, "all_layers": True}
    found = nncf.compress_weights(core.read_model(onnx_ir.to_proto(lower(model, PLAIN)).SerializeToString()), **how)
    path = folder / f"nncf-{precision}.xml"
    openvino.save_model(found, path, compress_to_fp16=False)
    size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")))
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    shapes = [1, *[d.get_length() for d in found.inputs[0].get_partial_shape()[1:]]]
    many = core.compile_model(found, "CPU", config)
    single = found.clone()
    single.reshape(shapes)
    one = core.compile_model(single, "CPU", config).create_infer_request()
    return Row(
        precision,
        "NNCF compress_weights",
        "openvino",
        size,
        lambda x: np.asarray((one.infer({0: x}, share_inputs=True) if len(x) == 1 else many(x))[0]),
    )


def main() -> None:
    parser = arguments(__doc__, images=500)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trial = open_trial(options)
    with tempfile.TemporaryDirectory() as temporary:
        rows = ours(trial, "fp32", Path(temporary))
        for precision in WEIGHT_ONLY:
            rows += ours(trial, precision, Path(temporary))
            rows.append(nncf_weights(trial.model, precision, Path(temporary)))
        times = 1e9 * turns([row.run for row in rows], trial.evaluation[:1], options.rounds)[..., 0].T
        base = {row.runtime: i for i, row in reversed(list(enumerate(rows)))}
        print(
            "\n| bits | method | runtime | MB | agreement | flips | KL | time / fp32 (95 %) |\n|---|---|---|---|---|---|---|---|"
        )
        for row, taken in zip(rows, times, strict=True):
            r = faster(taken.tolist(), times[base[row.runtime]].tolist())
            found = score(in_batches(row.run, trial.evaluation), trial)
            head = f"| {row.precision} | {row.method} | {row.runtime} | {row.size_bytes / 1e6:.2f}"
            answers = f"{found['agreement']:.2f} | {found['flips']} | {found['kl']:.1e}"
            print(f"{head} | {answers} | {r.ratio:.2f} ({r.low:.2f}-{r.high:.2f}) |")


if __name__ == "__main__":
    main()
