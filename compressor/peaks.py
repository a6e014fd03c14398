"""What this machine can do at best, measured through a target's own matrix multiplication."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import targets
from compressor.profile import copy_bytes_per_s
from compressor.roofline import Peaks, efficiency, fold, work
from compressor.spec import BlockSpec, Preprocess, VitSpec
from compressor.types import Artifact, BuildOptions, Model, OpRecord, Precision, QParams, Quantization

__all__ = ["measure_peaks", "parts"]

# One wide block, every row computed: its MLP is two large products of the shapes a ViT-Base has.
SPEC = VitSpec((224, 224), (16, 16), 3, 768, (BlockSpec(1, 8, 8, 3072),), prefix_tokens=0, pool="avg", num_classes=2)
MEASURED: tuple[Precision, ...] = ("fp32", "bf16", "w8a8")
PROFILES = 3


def measure_peaks(target: str, precision: Precision, threads: int) -> Peaks:
    """The best multiply-adds per second of fc1 or fc2 of `SPEC` on `target`, and bytes per second of copying memory.

    Args:
        target: an available target.
        precision: fp32, bf16 or w8a8; where it is an integer one the float peak is measured too, for what stays float.
        threads: of the session, as in the measurement it is compared with.
    """
    rates: dict[str, float] = {}
    for wanted in dict.fromkeys((precision, "fp32")):
        if wanted in MEASURED and wanted in targets.get(target).CAPABILITIES.precisions:
            for recorded, rate in _rates(target, wanted, threads).items():
                rates[recorded] = max(rate, rates.get(recorded, 0.0))
    return Peaks(rates, copy_bytes_per_s())


def parts(
    ops: Sequence[OpRecord], spec: VitSpec, artifact: Artifact, *, threads: int, batch: int
) -> list[dict[str, Any]]:
    """The ``parts`` of ``vitrim profile --per-op --json``: nodes added up per block and part, with their efficiency.

    Args:
        ops: nodes as executed.
        spec: of the model that ran.
        artifact: that ran.
        threads: of the session.
        batch: images per inference.
    """
    found = fold(ops)
    # The device install cannot build the measuring network, and a vendor compiler would take minutes: then it stays unknown
    if find_spec("onnx_ir") is not None and {op.placement for op in ops} == {"CPU"}:
        peaks = measure_peaks(artifact.target, artifact.precision, threads)
        found = efficiency(found, spec, peaks, batch=batch)
    return [{**vars(part), "placements": list(part.placements)} for part in found]


def _rates(target: str, precision: Precision, threads: int) -> dict[str, float]:
    """Multiply-adds per second by the precision that the runtime recorded."""
    rng, module = np.random.default_rng(0), targets.get(target)
    weights = {n: (0.02 * rng.standard_normal(s)).astype(np.float32) for n, s in SPEC.shapes().items()}
    model = Model(SPEC, weights, Preprocess((224, 224)))
    quantization = _quantization(model) if precision == "w8a8" else None
    from compressor.lower import lower

    pixels, rates = rng.standard_normal((1, 3, 224, 224), dtype=np.float32), dict[str, float]()
    with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
        graph = lower(model, module.CAPABILITIES, quantization)
        artifact = module.build(graph, BuildOptions(Path(folder), precision))
        session = module.open(artifact, threads=threads)
        for _ in range(PROFILES):
            for part in fold(session.ops({artifact.inputs[0].name: pixels})):
                if part.part in ("fc1", "fc2") and part.time_ms > 0:
                    rate = work(SPEC)[part.block, part.part][0] / (part.time_ms / 1e3)
                    rates[part.precision] = max(rate, rates.get(part.precision, 0.0))
    return rates


def _quantization(model: Model) -> Quantization:
    """Integers for the MLP; only the time matters, so any grid will do."""
    weights = {}
    for name in ("blocks.0.fc1.weight", "blocks.0.fc2.weight"):
        scale = np.abs(model.weights[name]).max(axis=1) / np.float32(127)
        weights[name] = QParams(scale, 0, 8, axis=0)
    return Quantization(
        weights, {site: QParams(np.asarray(0.05, np.float32), 0, 8) for site in ("blocks.0.fc1", "blocks.0.fc2")}
    )
