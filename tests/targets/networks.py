"""Small networks of every family the canonical form holds, with random weights and grids; dense and pruned."""

from dataclasses import replace

import numpy as np

from compressor.types import BlockSpec, Model, Preprocess, QParams, Quantization, VitSpec, Width, largest

BLOCK = BlockSpec(heads=2, qk_dim=16, v_dim=16, mlp_dim=64)
PLAIN = VitSpec((32, 32), (8, 8), 3, 32, (BLOCK,) * 2, num_classes=10)


def of(**changes: object) -> VitSpec:
    return replace(PLAIN, blocks=(replace(BLOCK, **changes),) * 2)


FAMILIES = {
    "deit": PLAIN,
    "deit_distilled": replace(PLAIN, prefix_tokens=2, pool="token_dist"),
    "mae": replace(PLAIN, pool="avg", norm_after_pool=True),
    "dinov2": replace(of(mlp="swiglu"), prefix_tokens=5, pool="token_avg", num_classes=0),
    "clip": of(mlp="quick_gelu"),
    "siglip": replace(of(mlp="gelu_tanh"), prefix_tokens=0, pool="avg"),
    "qk_norm": of(qk_norm=True),
    "odd_patch": replace(PLAIN, image_size=(30, 44), patch_size=(7, 14)),
}


def pruned(spec: VitSpec) -> VitSpec:
    """Half the hidden units and half the query/key dimensions gone; heads are then narrower in q and k than in v."""
    blocks = (replace(b, mlp_dim=b.mlp_dim // 2, qk_dim=b.qk_dim // 2) for b in spec.blocks)
    return replace(spec, blocks=tuple(blocks))


def uneven(spec: VitSpec) -> VitSpec:
    """Widths as an unrounded pruner leaves them: another in every block, of no multiple, q and k narrower or wider than v."""
    sizes = ((12, 16, 50), (7, 5, 33))
    blocks = (replace(b, qk_dim=q, v_dim=v, mlp_dim=m) for b, (q, v, m) in zip(spec.blocks, sizes, strict=True))
    return replace(spec, blocks=tuple(blocks))


LEVELS = {"dense": lambda spec: spec, "pruned": pruned, "uneven": uneven}


def model(spec: VitSpec, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    weights = {n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in spec.shapes().items()}
    for name, weight in weights.items():
        if "norm" in name and name.endswith("weight"):
            weight += 1.0
    return Model(spec, weights, Preprocess(spec.image_size))


def pixels(spec: VitSpec, count: int = 4) -> np.ndarray:
    shape = (count, spec.in_chans, *spec.image_size)
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32)


def grids(model: Model, width: Width = 8) -> Quantization:
    """int8 everywhere, or 8-bit floats but for the patch embedding, as a target with a patch convolution gets them.

    Weight grids are per output channel and from the weights, activation grids wide enough for unit variance.
    """
    weights = {
        name: QParams((np.abs(w.reshape(len(w), -1)).max(1) / largest(width)).astype(np.float32), 0, width, axis=0)
        for name, w in model.weights.items()
        if name.endswith(".weight") and "norm" not in name and (width == 8 or name != "patch.weight")
    }
    sites = [f"blocks.{i}.{part}" for i in range(len(model.spec.blocks)) for part in ("qkv", "proj", "fc1", "fc2")]
    if model.spec.num_classes:
        sites.append("head")
    if width == 8:
        sites.append("patch")
    scale = np.float32(0.04 * 127 / largest(width))
    return Quantization(weights, {site: QParams(scale, 0, width) for site in sites}, "w8a8" if width == 8 else "fp8")
