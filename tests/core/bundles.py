"""Small sealed bundles, and copies of them whose manifest or files were edited and whose digests were made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import targets
from compressor import checkpoint
from compressor.candidates import build, logits
from compressor.manifest import FileEntry, artifact_entry, seal, sha256_file
from compressor.types import BuildOptions
from tests.targets.networks import PLAIN, model, pixels

__all__ = ["edited", "forged", "sealed"]


def sealed(folder: Path, *names: str) -> Path:
    """A bundle in `folder` for the targets `names`, as `vitrim compress` leaves it but for the report."""
    network, images = model(PLAIN), pixels(PLAIN, 2)
    checkpoint.save(network, folder)
    arrays, entries = {}, {}
    for name in names:
        artifact = build(network, name, BuildOptions(folder / "targets" / name, "fp32", "fp32"))
        session = targets.get(name).open(artifact)
        arrays[f"outputs.{name}"] = np.concatenate([logits(session, artifact, x[None]) for x in images])
        entries[name] = artifact_entry(artifact, folder).model_dump()
    np.savez(folder / "golden.npz", inputs=images, reference=arrays[f"outputs.{names[0]}"], **arrays)
    content: dict[str, Any] = {key: {} for key in ("recipe", "versions", "calibration", "checkpoint")}
    content |= {"spec": asdict(network.spec), "preprocess": asdict(network.preprocess), "labels": [], "seed": 0}
    seal(folder, {**content, "targets": entries})
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The bundle at `folder` with its manifest changed, digests as they were."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def forged(folder: Path, **arrays: Any) -> Path:
    """The bundle at `folder` with `arrays` in golden.npz (None: taken out), and its digest made again."""
    path = folder / "golden.npz"
    with np.load(path) as stored:
        kept = {**stored, **arrays}
    np.savez(path, **{name: array for name, array in kept.items() if array is not None})
    entry = FileEntry(sha256=sha256_file(path), size=path.stat().st_size).model_dump()
    return edited(folder, lambda manifest: manifest["files"].update({"golden.npz": entry}))
