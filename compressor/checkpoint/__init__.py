"""Checkpoint -> `Model`: one reader per family, each a table of names; and `save`, its inverse for vitrim's own format.

documents.py   JSON, checked          tensors.py   weight files, read without executing anything
slots.py       names -> slots         assemble.py  slots -> spec and canonical weights
positions.py   resampling             architectures.py   what a timm name says
timm.py  transformers.py  torchvision.py  vitrim.py     the families
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compressor.checkpoint import timm, torchvision, transformers, vitrim
from compressor.checkpoint.assemble import Size
from compressor.checkpoint.documents import read_json
from compressor.checkpoint.tensors import read_weights
from compressor.errors import CheckpointError, ConfigError
from compressor.types import Model

__all__ = ["describe", "load", "save"]

DEMO = Path(__file__).parent.parent / "demo"


def load(source: str, *, arch: str | None = None, image_size: int | tuple[int, int] | None = None) -> Model:
    """The model of a checkpoint, in canonical form. Nothing in the checkpoint is executed.

    Args:
        source: ``demo`` (the embedded model); a folder in timm-hub, transformers or vitrim layout (a bundle is one); a bare
            ``.safetensors`` or ``.pth`` file, with `arch`; or ``timm:NAME`` where timm is installed.
        arch: the timm or torchvision name of a bare file's architecture.
        image_size: pixels, one side or (height, width); positions are resampled as the family does it. None: its own size.

    Raises:
        UnsupportedModel: a network that is not a plain Vision Transformer, by the name of its first unknown tensor.
        CheckpointError: missing, damaged, incomplete, or not what its config says.
        ConfigError: an unknown `arch`, a bad `image_size`, or `arch` where it does not belong.
    """
    size = _size(image_size)
    if source == "demo":
        model = _folder(DEMO, size)
        return replace(model, origin=replace(model.origin, name="demo"))
    if source.startswith("timm:"):
        return timm.download(source.removeprefix("timm:"), size)
    path = Path(source).expanduser()
    try:
        if path.is_dir() and (arch is None or (path / "config.json").exists()):
            if arch is not None:
                raise ConfigError(
                    f"{source}: arch must not be given with a config.json, got {arch!r}.", hint="Leave it out."
                )
            return _folder(path, size)
        if path.exists():
            return _bare(path, arch, size)
    except OSError as error:
        raise CheckpointError(f"{source}: the checkpoint must be readable, got {error.strerror}.") from None
    raise CheckpointError(
        f"{source}: no such file or folder.", hint="Give a checkpoint's folder or file, demo, or timm:NAME."
    )


def save(model: Model, folder: Path) -> None:
    """Write `model` as ``model.safetensors`` and ``config.json``; `load` gives it back bit for bit.

    Not atomic: give a temporary folder and rename it.

    Raises:
        OSError: the folder cannot be written.
    """
    vitrim.save(model, folder)


def describe(model: Model) -> dict[str, Any]:
    """What `model` is, as plain JSON values: family, sizes per block, parameters, MACs, preprocessing."""
    spec = model.spec
    return {
        "family": model.origin.family,
        "name": model.origin.name,
        "params": model.params,
        "macs": spec.macs(),
        "image_size": list(spec.image_size),
        "patch_size": list(spec.patch_size),
        "embed_dim": spec.embed_dim,
        "depth": len(spec.blocks),
        "pool": spec.pool,
        "prefix_tokens": spec.prefix_tokens,
        "num_classes": spec.num_classes,
        "blocks": [asdict(block) for block in spec.blocks],
        "preprocess": asdict(model.preprocess),
        "sha256": model.origin.sha256,
    }


def _size(image_size: int | tuple[int, int] | None) -> Size | None:
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ConfigError(f"image_size must be positive, got {height} x {width}.")
    return height, width


def _folder(folder: Path, size: Size | None) -> Model:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: a checkpoint's folder must hold config.json, got none.",
            hint="Give the folder of a timm or transformers model, a vitrim bundle, or its weights file with --arch NAME.",
        )
    config = read_json(folder / "config.json")
    kinds = {"format", "architecture", "model_type"} & config.keys()
    if not kinds:
        raise CheckpointError(
            f"{folder / 'config.json'}: architecture (timm), model_type (transformers) or format (vitrim) is missing."
        )
    tensors = read_weights(folder)
    if "format" in kinds:
        return vitrim.read(tensors, config, size)
    if "architecture" in kinds:
        return timm.read(tensors, config, size)
    processor = folder / "preprocessor_config.json"
    return transformers.read(tensors, config, read_json(processor) if processor.exists() else None, size)


def _bare(path: Path, arch: str | None, size: Size | None) -> Model:
    if arch is None:
        raise ConfigError(
            f"{path}: arch must name the architecture of a bare file, got none.",
            hint="For example --arch deit_tiny_patch16_224.",
        )
    tensors = read_weights(path)
    if arch in torchvision.ARCHITECTURES:
        return torchvision.read(tensors, arch, size)
    return timm.read(tensors, {"architecture": arch}, size)
