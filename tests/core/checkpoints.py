"""Tiny checkpoints for the tests, written by the libraries themselves; every parameter is random, none zero or one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.checkpoint import load, save
from compressor.spec import Model
from compressor.vit import to_torch
from tests import peers

# DINOv2's names in timm start at 518 px, others at 224: every model here states its own size.
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}

# Float32 forward passes in another order of operations: logits of size 1 agree to about 1e-6; ten times that is allowed,
# a tenth of what the design asks for (1e-4).
TOLERANCE = 1e-5


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Freshly initialised models have zero biases, zero tokens and equal LayerScales: comparing those proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    return randomise(peers.import_timm().create_model(name, **(TINY | kwargs)))


def save_timm(model: nn.Module, folder: Path) -> Path:
    """timm's hub layout, written by timm."""
    peers.import_timm()
    from timm.models import _hub

    _hub.save_for_hf(model, folder, safe_serialization=True)
    return folder


def transformers_model(kind: str, **config: Any) -> nn.Module:
    """`kind` is the class, e.g. ``ViTForImageClassification``."""
    transformers = peers.import_transformers()
    name = kind.split("For", maxsplit=1)[0].removesuffix("Model")
    tiny = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    tiny |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
    if "Registers" in name:
        tiny["num_register_tokens"] = 3
    return randomise(getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**(tiny | config))))


def save_transformers(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def torchvision_model(**kwargs: Any) -> nn.Module:
    peers.import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    tiny = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 12, "hidden_dim": 36, "mlp_dim": 20}
    return randomise(VisionTransformer(**(tiny | {"num_classes": 5} | kwargs)))


def pixels(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(3, channels, height, width, generator=torch.Generator().manual_seed(1))


def logits(model: Model, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return to_torch(model)(x).numpy()


def module_logits(module: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return module(x).numpy()


def transformers_logits(module: nn.Module, x: Tensor, **kwargs: Any) -> np.ndarray:
    with torch.no_grad():
        out = module(x, **kwargs)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0]).numpy()


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05  # outputs that hardly vary would agree whatever we do
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def edit(file: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a safetensors file."""
    tensors = load_file(file) | changes
    file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, file)


def good_folders(root: Path) -> Path:
    """One good checkpoint per layout under `root`; tests damage copies of them."""
    save_timm(timm_model("deit3_small_patch16_224"), root / "timm")
    save_timm(timm_model("vit_tiny_patch16_224", in_chans=1), root / "gray")
    save_timm(timm_model("deit_tiny_distilled_patch16_224"), root / "distilled")
    save_transformers(transformers_model("ViTForImageClassification"), root / "transformers")
    save_transformers(transformers_model("ViTForImageClassification"), root / "shards", max_shard_size="8KB")
    torch.save(load_file(root / "timm" / "model.safetensors"), root / "bare.pth")
    shutil.copy(root / "timm" / "model.safetensors", root / "bare.safetensors")
    save(replace(load(str(root / "timm")), labels=tuple("abcde")), root / "vitrim")
    for layout in ("timm", "gray", "distilled", "transformers", "shards", "vitrim"):
        load(str(root / layout))
    return root


def config(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``__`` goes into objects, None removes."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, key = name.split("__")
        place = content
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        place[key] = value
        if value is None:
            del place[key]
    path.write_text(json.dumps(content))
