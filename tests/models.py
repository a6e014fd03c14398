"""Small random models of every shape the spec allows, and the plainest quantization there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from compressor.types import BlockSpec, Model, Preprocess, QParams, Quantization, VitSpec, Width, largest
from compressor.vit import to_torch

BASE = VitSpec((16, 16), (4, 4), 3, 24, (BlockSpec(2, 6, 8, 20), BlockSpec(3, 4, 5, 28)), num_classes=7)


def blocks(**changes: object) -> VitSpec:
    return replace(BASE, blocks=tuple(replace(b, **changes) for b in BASE.blocks))  # type: ignore[arg-type]


SPECS = {
    "unequal widths": BASE,
    "one block": replace(BASE, blocks=BASE.blocks[:1]),
    "no classifier": replace(BASE, num_classes=0),
    "odd image": replace(BASE, image_size=(18, 17)),
    "oblong patches": replace(BASE, image_size=(16, 24), patch_size=(4, 6)),
    "one channel": replace(BASE, in_chans=1),
    "one patch": replace(BASE, image_size=(4, 4)),
    "registers": replace(BASE, prefix_tokens=4),
    "avg without prefix": replace(BASE, prefix_tokens=0, pool="avg"),
    "avg": replace(BASE, pool="avg"),
    "norm after pool": replace(BASE, pool="avg", norm_after_pool=True),
    "norm after token": replace(BASE, pool="token", norm_after_pool=True),
    "distilled": replace(BASE, prefix_tokens=2, pool="token_dist"),
    "distilled without classifier": replace(BASE, prefix_tokens=2, pool="token_dist", num_classes=0),
    "token_avg": replace(BASE, pool="token_avg", prefix_tokens=3),
    "token_avg without classifier": replace(BASE, pool="token_avg", num_classes=0),
    "gelu_tanh": blocks(mlp="gelu_tanh"),
    "quick_gelu": blocks(mlp="quick_gelu"),
    "swiglu": blocks(mlp="swiglu"),
    "qk_norm": blocks(qk_norm=True),
}


def random_model(spec: VitSpec = BASE, seed: int = 7) -> Model:
    """Every parameter random; none at the value that would hide a missing term."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in spec.shapes().items():
        spread = 1.0 / np.sqrt(np.prod(shape[1:])) if name.endswith("weight") and len(shape) > 1 else 0.3
        weights[name] = (spread * rng.normal(size=shape) + (".weight" in name and len(shape) == 1)).astype(np.float32)
    channels = "RGB" if spec.in_chans == 3 else "L"
    count = 3 if channels == "RGB" else 1
    return Model(spec, weights, Preprocess(spec.image_size, mean=(0.5,) * count, std=(0.5,) * count, channels=channels))


def random_pixels(spec: VitSpec, batch: int = 3, seed: int = 1) -> np.ndarray:
    """(batch, in, h, w) float32."""
    size = (batch, spec.in_chans, *spec.image_size)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def torch_logits(model: Model, pixels: np.ndarray) -> np.ndarray:
    """What the model computes, by torch."""
    with torch.inference_mode():
        return to_torch(model)(torch.from_numpy(pixels)).numpy()


def linear_sites(spec: VitSpec) -> dict[str, str]:
    """Weight name -> site of its input, for every linear of the model, written out."""
    table = {"patch.weight": "patch"} | ({"head.weight": "head"} if spec.num_classes else {})
    for i, block in enumerate(spec.blocks):
        parts = {"q": "qkv", "k": "qkv", "v": "qkv", "proj": "proj", "fc1": "fc1", "fc2": "fc2"}
        parts |= {"gate": "fc1"} if block.mlp == "swiglu" else {}
        table |= {f"blocks.{i}.{part}.weight": f"blocks.{i}.{site}" for part, site in parts.items()}
    return table


def minmax(model: Model, pixels: np.ndarray, width: Width = 8) -> Quantization:
    """Symmetric grids that reach the largest value seen: per tensor, and per output channel for weights."""
    amax, sites, top = reach(model, pixels), linear_sites(model.spec), largest(width)
    scale = {n: np.abs(model.weights[n].reshape(len(model.weights[n]), -1)).max(1) / top for n in sites}
    weights = {name: QParams(s.astype(np.float32), 0, width, axis=0) for name, s in scale.items()}
    grids = {s: QParams(np.float32(amax[s] / top), 0, width) for s in sites.values()}
    return Quantization(weights, grids, "w8a8" if width == 8 else "fp8")


def with_scores(plan: Quantization, model: Model, pixels: np.ndarray) -> Quantization:
    """`plan` with int8 grids for every q and k too."""
    scores = {
        s: QParams(np.float32(a / 127), 0, 8) for s, a in reach(model, pixels).items() if s.endswith((".q", ".k"))
    }
    return replace(plan, activations={**plan.activations, **scores})


def reach(model: Model, pixels: np.ndarray) -> dict[str, float]:
    """The largest absolute value at every site."""
    amax: dict[str, float] = {}

    def tap(site: str, x: torch.Tensor) -> torch.Tensor:
        amax[site] = max(amax.get(site, 0.0), float(x.abs().max()))
        return x

    with torch.inference_mode():
        to_torch(model)(torch.from_numpy(pixels), tap)
    return amax
