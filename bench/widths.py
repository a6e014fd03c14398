"""Which widths a runtime's kernels like: time per kept unit at sizes just above a multiple, on two blocks of a DeiT shape.

    python bench/widths.py [--targets ort openvino] [--shape small] [--rounds 60] [--part mlp qk]

Weights and images are random: this measures time, never accuracy. All widths of one target and precision take turns in a new
order every round; shown is the median of the per-round ratios to the roundest width, divided by the ratio of multiply-adds:
1.00 costs no more than its size, 1.10 wastes a tenth. `Capabilities.width_multiple` is what wastes nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from latency import images, network, session_run, spec_of
from trial import turns

import targets
from calibration.observe import ObservePlan, observe
from compressor.lower import lower
from compressor.quantize import quantize
from compressor.quantize.plan import for_target
from compressor.types import BuildOptions, Model, Precision, Session
from compressor.vit import to_torch

OFFSETS = {"mlp": (0, 1, 2, 4, 8, 12, 16, 24, 32), "qk": (0, 1, 2, 4, 8, 12, 16)}
BASE = {"mlp": 0.5, "qk": 0.5}  # of the full width, the size that a pruned model has


def model_of(shape: str, part: str, extra: int) -> Model:
    """Two blocks with half the width of `part`, and `extra` units on top; random weights."""
    whole = spec_of(shape)
    block = whole.blocks[0]
    width = round(BASE[part] * (block.mlp_dim if part == "mlp" else block.qk_dim)) + extra
    block = replace(block, mlp_dim=width) if part == "mlp" else replace(block, qk_dim=width)
    return network(replace(whole, blocks=(block,) * 2))


def open_session(model: Model, name: str, precision: Precision, folder: Path) -> Session:
    target, plan = targets.get(name), None
    if precision == "w8a8":
        stats = observe(to_torch(model), images(model.spec, 2), ObservePlan(moments=(), pair_energy=False))
        plan = quantize(model, stats, for_target(target.CAPABILITIES, precision))
    return target.open(target.build(lower(model, target.CAPABILITIES, plan), BuildOptions(folder, precision)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["ort", "openvino"])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--part", nargs="+", choices=sorted(OFFSETS), default=sorted(OFFSETS))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.part:
        print(f"\n| {part} | " + " | ".join(f"+{o}" for o in OFFSETS[part]) + " |")
        print("|---" * (1 + len(OFFSETS[part])) + "|")
        models = [model_of(options.shape, part, extra) for extra in OFFSETS[part]]
        macs = np.array([m.spec.macs() for m in models])
        for name in options.targets:
            for precision in ("fp32", "w8a8"):
                with tempfile.TemporaryDirectory() as folder:
                    sessions = [open_session(m, name, precision, Path(folder) / str(i)) for i, m in enumerate(models)]
                    runs = [session_run(session) for session in sessions]
                    times = turns(runs, images(models[0].spec, 1)[0], options.rounds)[..., 0]
                waste = np.median(times / times[:, :1], axis=0) / (macs / macs[0])
                print(f"| {name} {precision} | " + " | ".join(f"{w:.2f}" for w in waste) + " |", flush=True)


if __name__ == "__main__":
    main()
