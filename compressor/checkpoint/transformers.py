"""Checkpoints in transformers' names: ViT, DeiT, DINOv2 and DINOv2 with registers, with or without a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from compressor.checkpoint.architectures import HALF, IMAGENET, Pixels
from compressor.checkpoint.assemble import Facts, Size, assemble
from compressor.checkpoint.documents import parse
from compressor.checkpoint.images import channels, crop_ratio, per_channel
from compressor.checkpoint.positions import Resampling
from compressor.checkpoint.slots import Slots, Table
from compressor.checkpoint.tensors import Tensors
from compressor.errors import CheckpointError, UnsupportedModel
from compressor.types import MlpKind, Model, Origin, Pool, Preprocess, VitSpec

__all__ = ["TABLE", "read"]

# As released, and as transformers 5 names them in memory.
OLD, NEW = "encoder.layer.#", "layers.#"

TABLE: Table = {
    "patch.*": "embeddings.patch_embeddings.projection.*",
    "cls": "embeddings.cls_token",
    "dist": "embeddings.distillation_token",
    "reg": "embeddings.register_tokens",
    "pos": "embeddings.position_embeddings",
    "blocks.#.norm1.*": f"{OLD}.layernorm_before.* | {NEW}.layernorm_before.* | {OLD}.norm1.*",
    "blocks.#.q.*": f"{OLD}.attention.attention.query.* | {NEW}.attention.q_proj.* | {OLD}.attention.q_proj.*",
    "blocks.#.k.*": f"{OLD}.attention.attention.key.* | {NEW}.attention.k_proj.* | {OLD}.attention.k_proj.*",
    "blocks.#.v.*": f"{OLD}.attention.attention.value.* | {NEW}.attention.v_proj.* | {OLD}.attention.v_proj.*",
    "blocks.#.proj.*": f"{OLD}.attention.output.dense.* | {NEW}.attention.o_proj.* | {OLD}.attention.o_proj.*",
    "blocks.#.ls1": f"{OLD}.layer_scale1.lambda1",
    "blocks.#.norm2.*": f"{OLD}.layernorm_after.* | {NEW}.layernorm_after.* | {OLD}.norm2.*",
    "blocks.#.gate.*": f"{OLD}.mlp.gate_proj.*",
    "blocks.#.fc1.*": f"{OLD}.intermediate.dense.* | {NEW}.mlp.fc1.* | {OLD}.mlp.fc1.*"
    f" | {OLD}.mlp.weights_in.* | {OLD}.mlp.up_proj.*",
    "blocks.#.fc2.*": f"{OLD}.output.dense.* | {NEW}.mlp.fc2.* | {OLD}.mlp.fc2.*"
    f" | {OLD}.mlp.weights_out.* | {OLD}.mlp.down_proj.*",
    "blocks.#.ls2": f"{OLD}.layer_scale2.lambda1",
    "norm.*": "layernorm.*",
    "head.*": "classifier.* | cls_classifier.*",
    "head_dist.*": "distillation_classifier.*",
    "ignored": "embeddings.mask_token | pooler.dense.*",
}

ACTIVATIONS: Mapping[str, MlpKind] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
RESAMPLE: Mapping[int, Literal["nearest", "bilinear", "bicubic", "lanczos"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}


class Family(NamedTuple):
    """Defaults of one model type: of its config, and of its image processor (transformers 5 documentation)."""

    norm_eps: float
    pool: Pool  # of the classification model
    resampling: Resampling
    size: dict[str, int]
    crop: int | None  # None: no centre crop
    resample: int
    pixels: Pixels


FAMILIES: Mapping[str, Family] = {
    "vit": Family(1e-12, "token", "plain", {"height": 224, "width": 224}, None, 2, HALF),
    "deit": Family(1e-12, "token", "plain", {"height": 256, "width": 256}, 224, 3, HALF),
    "dinov2": Family(1e-6, "token_avg", "plain", {"shortest_edge": 256}, 224, 3, IMAGENET),
    "dinov2_with_registers": Family(1e-6, "token_avg", "antialias", {"shortest_edge": 256}, 224, 3, IMAGENET),
}


class Config(BaseModel):
    """The keys of ``config.json`` that matter here."""

    model_config = ConfigDict(allow_inf_nan=False)

    model_type: str
    num_attention_heads: int = Field(gt=0)
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float | None = Field(default=None, gt=0)
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    image_size: int | Size | None = None
    id2label: dict[int, str] | None = None


class Processor(BaseModel):
    """The keys of ``preprocessor_config.json`` that matter here; None: the family's default."""

    model_config = ConfigDict(allow_inf_nan=False)

    do_resize: bool = True
    size: int | dict[str, int] | None = None
    do_center_crop: bool | None = None
    crop_size: int | dict[str, int] | None = None
    resample: int | None = None
    do_rescale: bool = True
    rescale_factor: float = Field(default=1 / 255, gt=0)
    do_normalize: bool = True
    image_mean: tuple[float, ...] | float | None = None
    image_std: tuple[float, ...] | float | None = None


def read(
    tensors: Tensors, config: Mapping[str, Any], processor: Mapping[str, Any] | None, image_size: Size | None = None
) -> Model:
    """The model of a transformers state dict, its ``config.json`` and its ``preprocessor_config.json`` if there is one.

    DINOv2 is released for 518 pixels and run at its processor's size (224), positions being resampled on every call; so that
    size is taken when `image_size` is None.

    Raises:
        UnsupportedModel, CheckpointError: see `compressor.checkpoint.load`.
    """
    kind = str(config.get("model_type"))
    prefix = f"{kind}." if any(name.startswith(f"{kind}.") for name in tensors.shapes) else ""
    slots = Slots(tensors, TABLE, prefix)
    if kind not in FAMILIES:
        raise UnsupportedModel(f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}.")
    family, settings = FAMILIES[kind], parse(Config, config, "config.json: ")
    images = _processor(processor, family)
    if image_size is None and family.pool == "token_avg" and processor is not None:
        image_size = images.crop
    facts = _facts(slots, settings, family, has_classifier=bool(prefix))
    spec, weights = assemble(slots, facts, image_size)
    for name, stated, actual in (
        ("num_hidden_layers", settings.num_hidden_layers, len(spec.blocks)),
        ("hidden_size", settings.hidden_size, spec.embed_dim),
    ):
        if stated is not None and stated != actual:
            raise CheckpointError(f"config.json: {name} must be what the tensors say, {actual}, got {stated}.")
    origin = Origin("transformers", kind, tensors.sha256, tensors.params)
    return Model(spec, weights, _preprocess(images, spec), _labels(settings, spec), origin)


def _facts(slots: Slots, settings: Config, family: Family, *, has_classifier: bool) -> Facts:
    if settings.hidden_act not in ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {settings.hidden_act!r}."
        )
    size = settings.image_size
    return Facts(
        heads=settings.num_attention_heads,
        pool=family.pool if has_classifier else "token",
        mlp="swiglu" if settings.use_swiglu_ffn else ACTIVATIONS[settings.hidden_act],
        norm_eps=family.norm_eps if settings.layer_norm_eps is None else settings.layer_norm_eps,
        image_size=(size, size) if isinstance(size, int) else size,
        qkv_bias=settings.qkv_bias,
        resampling=family.resampling,
    )


def _labels(settings: Config, spec: VitSpec) -> tuple[str, ...]:
    """Class names in order; the placeholders LABEL_0, LABEL_1 ... count as none."""
    names = settings.id2label
    if not names or spec.num_classes == 0 or all(name == f"LABEL_{i}" for i, name in names.items()):
        return ()
    if sorted(names) != list(range(spec.num_classes)):
        raise CheckpointError(
            f"config.json: id2label must name classes 0 to {spec.num_classes - 1}, got {len(names)} names."
        )
    return tuple(names[i] for i in range(spec.num_classes))


class Images(NamedTuple):
    """An image processor's settings, complete."""

    resized: Size
    crop: Size
    exact: bool
    resample: int
    mean: tuple[float, ...]  # on the 0..1 scale
    std: tuple[float, ...]


def _processor(content: Mapping[str, Any] | None, family: Family) -> Images:
    where = "preprocessor_config.json: "
    given = parse(Processor, content or {}, where)
    size = _sides(
        family.size if given.size is None else given.size, where + "size", shortest="shortest_edge" in family.size
    )
    cropped = family.crop is not None if given.do_center_crop is None else given.do_center_crop
    crop = size[0]
    if cropped and given.crop_size is not None:
        crop = _sides(given.crop_size, where + "crop_size", shortest=False)[0]
    elif cropped and family.crop is not None:
        crop = family.crop, family.crop
    elif not cropped and not size[1]:
        raise CheckpointError(f"{where}size must give both sides, or do_center_crop be true, got {given.size}.")
    if not given.do_resize and (cropped or content is None):
        raise CheckpointError(f"{where}do_resize must be true before a centre crop, got false.")
    resample = family.resample if given.resample is None else given.resample
    if resample not in RESAMPLE:
        raise CheckpointError(f"{where}resample must be one of {sorted(RESAMPLE)}, got {resample}.")
    mean, std = _tuple(given.image_mean, family.pixels[0]), _tuple(given.image_std, family.pixels[1])
    if not given.do_normalize:
        mean, std = (0.0,), (1.0,)
    # (pixel * factor - mean) / std, rewritten for pixels on the 0..1 scale
    factor = 255 * given.rescale_factor if given.do_rescale else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    return Images(size[0], crop, size[1], resample, tuple(m / factor for m in mean), tuple(s / factor for s in std))


def _tuple(value: tuple[float, ...] | float | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if value is None:
        return default
    return (value,) if isinstance(value, float) else value


def _sides(value: int | dict[str, int], where: str, *, shortest: bool) -> tuple[Size, bool]:
    """(height, width) and whether both are set exactly, of any form a processor writes; `shortest`: what one number means."""
    if isinstance(value, int):
        value = {"shortest_edge": value} if shortest else {"height": value, "width": value}
    if min(value.values(), default=0) > 0:
        if set(value) == {"height", "width"}:
            return (value["height"], value["width"]), True
        if set(value) == {"shortest_edge"}:
            return (value["shortest_edge"], value["shortest_edge"]), False
    raise CheckpointError(f"{where} must be a positive number, height and width, or shortest_edge, got {value}.")


def _preprocess(images: Images, spec: VitSpec) -> Preprocess:
    ratios = [crop_ratio(crop, resized) for crop, resized in zip(images.crop, images.resized, strict=True)]
    if images.exact and ratios[0] != ratios[1]:
        raise CheckpointError(
            f"preprocessor_config.json: crop_size must have the proportions of size, got {images.crop} and {images.resized}."
        )
    mode, where = channels(spec.in_chans), "preprocessor_config.json: image_"
    return Preprocess(
        size=spec.image_size,
        crop=min(ratios),
        interpolation=RESAMPLE[images.resample],
        mean=per_channel(images.mean, spec.in_chans, where + "mean"),
        std=per_channel(images.std, spec.in_chans, where + "std"),
        channels=mode,
        resize="exact" if images.exact else "shorter",
    )
