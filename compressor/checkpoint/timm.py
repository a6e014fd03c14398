"""Checkpoints in timm's names: ViT, DeiT, DeiT distilled, DeiT-III, DINOv2, and the original releases that share them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.checkpoint.architectures import ARCHITECTURES, Architecture, find
from compressor.checkpoint.assemble import Facts, Size, assemble
from compressor.checkpoint.documents import parse
from compressor.checkpoint.images import channels, per_channel
from compressor.checkpoint.positions import find_grid
from compressor.checkpoint.slots import Slots, Table
from compressor.checkpoint.tensors import Tensors, from_state_dict
from compressor.errors import CheckpointError, ConfigError, UnsupportedModel
from compressor.types import MlpKind, Model, Origin, Pool, Preprocess, VitSpec

__all__ = ["TABLE", "download", "read"]

TABLE: Table = {
    "patch.*": "patch_embed.proj.*",
    "cls": "cls_token",
    "dist": "dist_token",
    "reg": "reg_token | register_tokens",
    "pos": "pos_embed",
    "blocks.#.norm1.*": "blocks.#.norm1.*",
    "blocks.#.qkv.*": "blocks.#.attn.qkv.*",
    "blocks.#.q_norm.*": "blocks.#.attn.q_norm.*",
    "blocks.#.k_norm.*": "blocks.#.attn.k_norm.*",
    "blocks.#.proj.*": "blocks.#.attn.proj.*",
    "blocks.#.ls1": "blocks.#.ls1.gamma | blocks.#.gamma_1",
    "blocks.#.norm2.*": "blocks.#.norm2.*",
    "blocks.#.gate.*": "blocks.#.mlp.fc1_g.*",
    "blocks.#.fc1.*": "blocks.#.mlp.fc1.* | blocks.#.mlp.fc1_x.* | blocks.#.mlp.w12.*",
    "blocks.#.fc2.*": "blocks.#.mlp.fc2.* | blocks.#.mlp.w3.*",
    "blocks.#.ls2": "blocks.#.ls2.gamma | blocks.#.gamma_2",
    "norm.*": "norm.*",
    "fc_norm.*": "fc_norm.*",
    "head.*": "head.*",
    "head_dist.*": "head_dist.*",
    "ignored": "mask_token",
}

# Arguments of timm's constructors that change what is computed, and the only value that is represented here.
FIXED_ARGS: Mapping[str, Any] = {
    "pre_norm": False,
    "final_norm": True,
    "pool_include_prefix": False,
    "dynamic_img_pad": False,
    "pos_embed": "learn",
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "norm_layer": None,
    "embed_norm_layer": None,
    "mlp_layer": None,
    "block_fn": None,
    "attn_layer": None,
    "embed_layer": None,
}


class Args(BaseModel):
    """Constructor arguments (``model_args``); those without a field do not matter at inference or show in the tensors."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    img_size: int | Size | None = None
    in_chans: int | None = None
    num_classes: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = Field(default=None, gt=0)
    global_pool: str | None = None
    qkv_bias: bool = True
    qk_norm: bool | None = None
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool | None = None
    reg_tokens: int | None = None
    act_layer: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] | None = None


class PretrainedCfg(BaseModel):
    """``pretrained_cfg``: how the weights' authors prepared images."""

    model_config = ConfigDict(allow_inf_nan=False)

    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    crop_mode: Literal["center", "squash"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    label_names: list[str] | dict[str, str] | None = None


class Hub(BaseModel):
    """timm's ``config.json``."""

    architecture: str
    num_classes: int | None = None
    global_pool: str | None = None
    label_names: list[str] | dict[str, str] | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    pretrained_cfg: PretrainedCfg = Field(default_factory=PretrainedCfg)


def read(tensors: Tensors, config: Mapping[str, Any], image_size: Size | None = None) -> Model:
    """The model of a timm state dict and its ``config.json``, of which only ``architecture`` is needed.

    Deviation from timm: without a stated ``global_pool``, a checkpoint that has ``fc_norm`` is pooled by average whatever its
    name says, since that is how such weights come about (MAE fine-tuning).

    Raises:
        UnsupportedModel, CheckpointError, ConfigError: see `compressor.checkpoint.load`.
    """
    slots = Slots(tensors, TABLE)
    hub = parse(Hub, config, "config.json: ")
    for name, value in FIXED_ARGS.items():
        if hub.model_args.get(name, value) != value:
            raise UnsupportedModel(f"config.json: model_args.{name} must be {value!r}, got {hub.model_args[name]!r}.")
    args = parse(Args, hub.model_args, "config.json: model_args.")
    name = hub.architecture.split(".")[0]  # behind the dot is the tag of the weights
    architecture = find(name, ARCHITECTURES)
    facts = _facts(slots, hub, args, architecture)
    spec, weights = assemble(slots, facts, image_size)
    _check_stated(slots, hub, args, spec)
    labels = _labels(hub.label_names or hub.pretrained_cfg.label_names) if spec.num_classes else ()
    origin = Origin("timm", name, tensors.sha256, tensors.params)
    return Model(spec, weights, _preprocess(hub.pretrained_cfg, architecture, spec), labels, origin)


def download(name: str, image_size: Size | None = None) -> Model:
    """The pretrained model that timm knows as `name`.

    Raises:
        ConfigError: timm is not installed, or the name is none of the plain Vision Transformers.
        CheckpointError: timm has no weights for it or could not fetch them.
    """
    find(name.split(".", maxsplit=1)[0], ARCHITECTURES)
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"timm:{name} needs timm, got: {error}.", hint="pip install timm") from None
    logger = logging.getLogger("huggingface_hub")  # announces every retry
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # noqa: BLE001 - a download fails in as many ways as there are networks
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise CheckpointError(
            f"timm:{name}: timm must have its weights and reach them, got: {reason}.",
            hint="Without a network, fetch the checkpoint elsewhere and give its folder.",
        ) from None
    finally:
        logger.setLevel(level)
    pretrained = model.pretrained_cfg
    pretrained = pretrained if isinstance(pretrained, dict) else pretrained.to_dict()
    tensors = from_state_dict(model.state_dict(), f"timm:{name}")
    return read(tensors, {"architecture": name, "pretrained_cfg": pretrained}, image_size)


def _facts(slots: Slots, hub: Hub, args: Args, architecture: Architecture) -> Facts:
    if slots.has("dist") and not slots.has("head_dist.weight"):
        raise UnsupportedModel(
            f"{slots.tensors.where}: a distilled model must have two heads, got none for the distillation token."
        )
    pool = args.global_pool or hub.global_pool or ("avg" if slots.has("fc_norm.weight") else architecture.pool)
    if pool not in ("token", "avg"):
        raise UnsupportedModel(f"config.json: global_pool must be token or avg, got {pool!r}.")
    pooled: Pool = "avg" if pool == "avg" else "token"
    if pooled == "token" and not slots.has("cls"):
        raise CheckpointError(f"{slots.tensors.where}: tensor 'cls_token' is missing, which global_pool 'token' reads.")
    mlp: MlpKind = architecture.mlp
    if args.act_layer is not None:
        mlp = "swiglu" if args.act_layer == "silu" else args.act_layer
    return Facts(
        heads=architecture.heads if args.num_heads is None else args.num_heads,
        pool=pooled,
        mlp=mlp,
        image_size=_own_size(slots, hub, args),
        qkv_bias=args.qkv_bias if "qkv_bias" in args.model_fields_set else slots.has("blocks.#.qkv.bias"),
        proj_bias=args.proj_bias,
    )


def _own_size(slots: Slots, hub: Hub, args: Args) -> Size | None:
    """What the checkpoint's positions were made for: ``img_size``, else ``input_size`` where it fits, else unknown."""
    if args.img_size is not None:
        return (args.img_size, args.img_size) if isinstance(args.img_size, int) else args.img_size
    if hub.pretrained_cfg.input_size is None:
        return None
    size = hub.pretrained_cfg.input_size[1:]
    rows, columns = slots.shape("patch.weight", 4)[2:]
    registers = slots.shape("reg", 3)[1] if slots.has("reg") else 0
    prefix = slots.has("cls") + slots.has("dist") + registers
    fits = find_grid(slots.shape("pos", 3)[1], prefix, (size[0] // rows, size[1] // columns))
    return size if fits is not None else None


def _check_stated(slots: Slots, hub: Hub, args: Args, spec: VitSpec) -> None:
    """Refuse a config that contradicts the tensors: one of the two is of another model."""
    prefix = spec.prefix_tokens - slots.has("cls") - slots.has("dist")
    found = {
        "num_classes": (hub.num_classes if hub.num_classes is not None else args.num_classes, spec.num_classes),
        "model_args.in_chans": (args.in_chans, spec.in_chans),
        "model_args.embed_dim": (args.embed_dim, spec.embed_dim),
        "model_args.depth": (args.depth, len(spec.blocks)),
        "model_args.qk_norm": (args.qk_norm, spec.blocks[0].qk_norm),
        "model_args.class_token": (args.class_token, slots.has("cls")),
        "model_args.reg_tokens": (args.reg_tokens, prefix),
        "model_args.init_values": (bool(args.init_values) or None, slots.has("blocks.#.ls1")),
    }
    for name, (stated, actual) in found.items():
        if stated is not None and stated != actual:
            raise CheckpointError(
                f"config.json: {name} must be what the tensors of {slots.tensors.where} say, {actual}, got {stated}."
            )


def _labels(names: list[str] | dict[str, str] | None) -> tuple[str, ...]:
    if not isinstance(names, dict):
        return tuple(names or ())
    try:
        return tuple(names[key] for key in sorted(names, key=int))
    except ValueError:
        raise CheckpointError(
            f"config.json: label_names must map class numbers to names, got key {min(names)!r}."
        ) from None


def _preprocess(cfg: PretrainedCfg, architecture: Architecture, spec: VitSpec) -> Preprocess:
    mode, resize = channels(spec.in_chans), architecture.resize
    if cfg.crop_mode is not None:
        resize = "exact" if cfg.crop_mode == "squash" else "shorter"
    return Preprocess(
        size=spec.image_size,
        crop=architecture.crop if cfg.crop_pct is None else cfg.crop_pct,
        interpolation=cfg.interpolation or architecture.interpolation,
        mean=per_channel(cfg.mean or architecture.pixels[0], spec.in_chans, "config.json: pretrained_cfg.mean"),
        std=per_channel(cfg.std or architecture.pixels[1], spec.in_chans, "config.json: pretrained_cfg.std"),
        channels=mode,
        resize=resize,
    )
