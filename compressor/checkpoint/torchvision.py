"""Checkpoints in torchvision's names: ``vit_b_16`` and its sisters."""

from __future__ import annotations

from collections.abc import Mapping

from compressor.checkpoint.architectures import IMAGENET, Architecture, find
from compressor.checkpoint.assemble import Facts, Size, assemble
from compressor.checkpoint.images import channels, crop_ratio, per_channel
from compressor.checkpoint.slots import Slots, Table
from compressor.checkpoint.tensors import Tensors
from compressor.types import Model, Origin, Preprocess

__all__ = ["ARCHITECTURES", "TABLE", "read"]

BLOCK = "encoder.layers.encoder_layer_#"

TABLE: Table = {
    "patch.*": "conv_proj.*",
    "cls": "class_token",
    "pos": "encoder.pos_embedding",
    "blocks.#.norm1.*": f"{BLOCK}.ln_1.*",
    "blocks.#.qkv.weight": f"{BLOCK}.self_attention.in_proj_weight",
    "blocks.#.qkv.bias": f"{BLOCK}.self_attention.in_proj_bias",
    "blocks.#.proj.*": f"{BLOCK}.self_attention.out_proj.*",
    "blocks.#.norm2.*": f"{BLOCK}.ln_2.*",
    "blocks.#.fc1.*": f"{BLOCK}.mlp.0.* | {BLOCK}.mlp.linear_1.*",
    "blocks.#.fc2.*": f"{BLOCK}.mlp.3.* | {BLOCK}.mlp.linear_2.*",
    "norm.*": "encoder.ln.*",
    "head.*": "heads.head.*",
}

# Preprocessing of the default weights (torchvision 0.28 documentation).
ARCHITECTURES: Mapping[str, Architecture] = {
    "vit_b_16": Architecture(12, 224, pixels=IMAGENET, crop=crop_ratio(224, 256), interpolation="bilinear"),
    "vit_b_32": Architecture(12, 224, pixels=IMAGENET, crop=crop_ratio(224, 256), interpolation="bilinear"),
    "vit_l_16": Architecture(16, 224, pixels=IMAGENET, crop=crop_ratio(224, 242), interpolation="bilinear"),
    "vit_l_32": Architecture(16, 224, pixels=IMAGENET, crop=crop_ratio(224, 256), interpolation="bilinear"),
    "vit_h_14": Architecture(16, 518, pixels=IMAGENET, crop=1.0),
}


def read(tensors: Tensors, name: str, image_size: Size | None = None) -> Model:
    """The model of a torchvision state dict; `name` is the architecture's.

    Raises:
        UnsupportedModel, CheckpointError, ConfigError: see `compressor.checkpoint.load`.
    """
    slots = Slots(tensors, TABLE)
    architecture = find(name, ARCHITECTURES)
    spec, weights = assemble(slots, Facts(heads=architecture.heads, resampling="corners"), image_size)
    mode = channels(spec.in_chans)
    preprocess = Preprocess(
        size=spec.image_size,
        crop=architecture.crop,
        interpolation=architecture.interpolation,
        mean=per_channel(architecture.pixels[0], spec.in_chans, f"{name}: mean"),
        std=per_channel(architecture.pixels[1], spec.in_chans, f"{name}: std"),
        channels=mode,
    )
    return Model(spec, weights, preprocess, origin=Origin("torchvision", name, tensors.sha256, tensors.params))
