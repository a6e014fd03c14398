"""vitrim's own folder: ``model.safetensors`` in canonical names, and ``config.json``. Also half of every bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from compressor.checkpoint.assemble import Size
from compressor.checkpoint.documents import parse
from compressor.checkpoint.images import channels
from compressor.checkpoint.positions import resample
from compressor.checkpoint.tensors import Tensors
from compressor.errors import CheckpointError, ConfigError
from compressor.types import Model, Origin, Preprocess, VitSpec

__all__ = ["FORMAT", "read", "save"]

FORMAT = "vitrim"


class Document(BaseModel):
    """``config.json``; every key is needed, and no other is allowed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["vitrim"]
    version: Literal[1]
    name: str
    params: int  # as the original checkpoint's authors count them; 0 once the network was changed
    spec: VitSpec
    preprocess: Preprocess
    labels: tuple[str, ...]


def save(model: Model, folder: Path) -> None:
    """Write `model` into `folder`, so that `read` gives the same spec, weights, preprocessing and labels, bit for bit.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(w) for n, w in model.weights.items()}, folder / "model.safetensors")
    document = {
        "format": FORMAT,
        "version": 1,
        "name": model.origin.name,
        "params": model.origin.params,
        "spec": asdict(model.spec),
        "preprocess": asdict(model.preprocess),
        "labels": model.labels,
    }
    (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(tensors: Tensors, config: Mapping[str, Any], image_size: Size | None = None) -> Model:
    """The model that `save` wrote; its origin's digest is that of the file read.

    Raises:
        CheckpointError: config and tensors are not those of one model.
    """
    try:
        document = parse(Document, config, "config.json: ")
    except ConfigError as error:  # raised by the records themselves
        raise CheckpointError(f"config.json: {error}", hint=error.hint) from None
    shapes = document.spec.shapes()
    for name in sorted(shapes.keys() ^ tensors.shapes.keys()):
        what = "is missing" if name in shapes else "is not part of the model its config.json describes"
        raise CheckpointError(f"{tensors.where}: tensor {name!r} {what}.")
    for name, shape in shapes.items():
        if tensors.shapes[name] != shape:
            raise CheckpointError(
                f"{tensors.where}: tensor {name!r} must have shape {shape}, got {tensors.shapes[name]}."
            )
    spec, images = document.spec, document.preprocess
    if (images.size, images.channels) != (spec.image_size, channels(spec.in_chans)):
        raise CheckpointError(
            f"config.json: preprocess must give {spec.image_size} x {spec.in_chans}, got {images.size} {images.channels}."
        )
    origin = Origin(FORMAT, document.name, tensors.sha256, document.params)
    model = Model(spec, {n: tensors.read(n) for n in shapes}, images, document.labels, origin)
    return model if image_size is None else _resized(model, image_size)


def _resized(model: Model, size: Size) -> Model:
    spec = replace(model.spec, image_size=size)
    pos = resample(model.weights["pos"], model.spec.grid, spec.grid, "antialias")
    return replace(
        model, spec=spec, weights={**model.weights, "pos": pos}, preprocess=replace(model.preprocess, size=size)
    )
