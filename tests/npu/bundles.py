"""What a compiler would have left, without one: artifacts and bundles whose files no board would take, with an estimate."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import targets
from compressor.bundle import Bundle
from compressor.lower import lower
from compressor.manifest import artifact_entry, seal
from compressor.types import Artifact, BuildOptions, OpRecord, TensorSpec
from targets import _estimate, rknn
from targets._artifacts import describe
from tests.npu.models import first_blocks, images

__all__ = ["FILES", "LOGITS", "MODEL", "artifact_of", "bundle_of"]

MODEL = first_blocks(1)
LOGITS = np.linspace(-1, 1, 10, dtype=np.float32)
FILES = {"bpu": ("model.bin", "model.quantized.onnx"), "rknn": tuple(f"model{suffix}" for suffix in rknn.SUFFIXES)}
OPS = (OpRecord("head.conv", "Conv", "NPU", "int8", 0.0), OpRecord("blocks.0.softmax", "Softmax", "CPU", "float", 0.0))


def artifact_of(name: str, folder: Path, latency_ms: float | None = None) -> Artifact:
    """Described as the target's `build` describes its own; the estimate says `latency_ms`."""
    graph = lower(MODEL, targets.get(name).CAPABILITIES)
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / file for file in FILES[name])
    for file in files:
        file.write_bytes(b"not a model")
    pieces = ({"name": "npu_0", "cycles": 2_500_000},)
    found = _estimate.Estimate("nobody's estimate", "everything else", latency_ms, pieces, OPS, 0.75)
    files += (_estimate.write(found, folder / "model.estimate.json"),)
    precision = targets.get(name).CAPABILITIES.precisions[0]
    made = describe(name, graph, BuildOptions(folder, precision), files, {"chip": "a-chip"})
    return replace(made, outputs=tuple(TensorSpec(o.name, o.dtype, o.shape[:2]) for o in made.outputs))


def bundle_of(name: str, root: Path, latency_ms: float | None = None) -> Bundle:
    """A bundle that holds target `name` alone."""
    artifact = artifact_of(name, root / "targets" / name, latency_ms)
    np.savez(
        root / "golden.npz",
        inputs=images(MODEL, 8),
        reference=np.tile(LOGITS, (8, 1)),
        **{f"outputs.{name}": np.tile(LOGITS, (8, 1))},
    )
    content = {
        "spec": asdict(MODEL.spec),
        "preprocess": asdict(MODEL.preprocess),
        "labels": list(MODEL.labels),
        "targets": {name: artifact_entry(artifact, root).model_dump()},
        **{key: {} for key in ("recipe", "versions", "calibration", "checkpoint")},
        "seed": 0,
    }
    seal(root, content)
    return Bundle.open(root)
