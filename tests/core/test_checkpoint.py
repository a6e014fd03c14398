"""Every family computes what its own library computes, at its own size and at another; nothing in a file is ignored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint import load
from compressor.checkpoint.architectures import ARCHITECTURES
from compressor.checkpoint.positions import resample
from tests import peers
from tests.core.checkpoints import (
    assert_same,
    edit,
    logits,
    module_logits,
    pixels,
    save_timm,
    save_transformers,
    timm_model,
    torchvision_model,
    transformers_logits,
    transformers_model,
)

GAP = {"class_token": False, "global_pool": "avg"}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit, odd sizes": (
        "vit_small_patch16_224",
        {"img_size": (30, 45), "patch_size": 7, "embed_dim": 15, "num_heads": 5},
    ),
    "vit, rectangular patches, gray": (
        "vit_base_patch16_224",
        {"patch_size": (5, 9), "img_size": (31, 29), "in_chans": 1},
    ),
    "vit, features": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "vit, pooled features": ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": "avg"}),
    "vit, average pool behind fc_norm": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "vit, token pool behind fc_norm": ("vit_base_patch16_224", {"fc_norm": True}),
    "vit, qk norm": ("vit_base_patch16_224", {"qk_norm": True, "embed_dim": 21}),
    "vit, no biases": ("vit_base_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "vit, quick gelu": ("vit_base_patch16_224", {"act_layer": "quick_gelu"}),
    "vit, tanh gelu by name": ("vit_base_patch32_siglip_gap_256", {}),
    "no class token": ("vit_medium_patch16_gap_240", {}),
    "no class token, fc_norm": ("vit_tiny_patch16_224", GAP | {"img_size": (24, 40)}),
    "registers, positions on all tokens": ("vit_base_patch16_224", {"reg_tokens": 3}),
    "registers, positions on patches": ("vit_small_patch14_reg4_dinov2", {"img_size": (16, 40)}),
    "registers without class token": ("vit_medium_patch16_reg4_gap_256", {}),
    "deit": ("deit_tiny_patch16_224", {"depth": 3}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 27, "patch_size": 6}),
    "deit III": ("deit3_small_patch16_224", {"mlp_ratio": 2.7, "img_size": (21, 34), "patch_size": 5}),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}),
    "dinov2, packed swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 2.5}),
}
TRANSFORMERS = {
    "vit": ("ViTForImageClassification", {}),
    "vit, odd sizes": ("ViTForImageClassification", {"image_size": (30, 45), "patch_size": 7, "hidden_size": 15}),
    "vit, gray, one layer": ("ViTForImageClassification", {"num_channels": 1, "num_hidden_layers": 1}),
    "vit, no qkv bias, quick gelu": ("ViTForImageClassification", {"qkv_bias": False, "hidden_act": "quick_gelu"}),
    "vit, new gelu": ("ViTForImageClassification", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "vit, features": ("ViTModel", {}),
    "deit": ("DeiTForImageClassification", {}),
    "deit with teacher": ("DeiTForImageClassificationWithTeacher", {"image_size": 29}),
    "deit, features": ("DeiTModel", {}),
    "dinov2": ("Dinov2ForImageClassification", {}),
    "dinov2, swiglu": ("Dinov2ForImageClassification", {"use_swiglu_ffn": True, "hidden_size": 21}),
    "dinov2, features": ("Dinov2Model", {}),
    "dinov2, pooled features": ("Dinov2ForImageClassification", {"num_labels": 0}),
    "dinov2 with registers": ("Dinov2WithRegistersForImageClassification", {"num_register_tokens": 4}),
    "dinov2 with registers, swiglu": ("Dinov2WithRegistersForImageClassification", {"use_swiglu_ffn": True}),
    "dinov2 with registers, features": ("Dinov2WithRegistersModel", {}),
}


# --------------------------------------------------------------------------- each family at its own size


@pytest.mark.parametrize("case", TIMM)
def test_timm_logits_are_equal(case, tmp_path):
    name, kwargs = TIMM[case]
    module = timm_model(name, **kwargs)
    model = load(str(save_timm(module, tmp_path)))
    x = pixels(*model.spec.image_size, model.spec.in_chans)
    assert_same(logits(model, x), module_logits(module, x))
    assert model.params == sum(p.numel() for p in module.parameters())
    assert model.origin.name == name and model.preprocess.size == model.spec.image_size


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_logits_are_equal(case, tmp_path):
    kind, settings = TRANSFORMERS[case]
    module = transformers_model(kind, **settings)
    model = load(str(save_transformers(module, tmp_path)))
    x = pixels(*model.spec.image_size, model.spec.in_chans)
    if case == "dinov2, pooled features":
        with torch.no_grad():
            tokens = module.dinov2(x).last_hidden_state
        theirs = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1).numpy()
    else:
        theirs = transformers_logits(module, x)
    assert_same(logits(model, x), theirs)
    assert model.params == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification"]
)
@pytest.mark.parametrize(
    "kwargs", [{"save_original_format": False}, {"max_shard_size": "8KB"}], ids=["new names", "shards"]
)
def test_transformers_other_layouts_are_equal(kind, kwargs, tmp_path):
    module = transformers_model(kind)
    model = load(str(save_transformers(module, tmp_path, **kwargs)))
    assert (tmp_path / "model.safetensors").exists() != ("max_shard_size" in kwargs)
    x = pixels(32, 32)
    assert_same(logits(model, x), transformers_logits(module, x))


@pytest.mark.parametrize("kwargs", [{}, {"hidden_dim": 60, "image_size": 27, "patch_size": 9, "num_classes": 3}])
def test_torchvision_logits_are_equal(kwargs, tmp_path):
    module = torchvision_model(**kwargs)
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    model = load(str(tmp_path / "vit.pth"), arch="vit_b_16")
    x = pixels(*model.spec.image_size)
    assert_same(logits(model, x), module_logits(module, x))
    assert model.params == sum(p.numel() for p in module.parameters())


def test_old_torchvision_names_are_equal(tmp_path):
    module = torchvision_model()
    renamed = {
        n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t for n, t in module.state_dict().items()
    }
    torch.save(renamed, tmp_path / "vit.pth")
    x = pixels(32, 32)
    assert_same(logits(load(str(tmp_path / "vit.pth"), arch="vit_b_16"), x), module_logits(module, x))


def test_separate_swiglu_of_a_bare_file_is_equal(tmp_path):
    timm = peers.import_timm()
    module = timm_model("vit_tiny_patch16_224", mlp_layer=timm.layers.SwiGLU, act_layer=torch.nn.SiLU, embed_dim=27)
    save_file(module.state_dict(), tmp_path / "vit.safetensors")
    x = pixels(32, 32)
    assert_same(
        logits(load(str(tmp_path / "vit.safetensors"), arch="vit_tiny_patch16_224"), x), module_logits(module, x)
    )


def test_names_of_the_original_releases_are_equal(tmp_path):
    """DINOv2 as released: w12 and w3, register_tokens, positions on class token and patches. DeiT-III: gamma_1."""
    module = timm_model("vit_giant_patch14_reg4_dinov2", mlp_ratio=2.5, num_heads=24, embed_dim=48, num_classes=0)
    state = module.state_dict()
    names = {"fc1": "w12", "fc2": "w3", "reg_token": "register_tokens", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    for old, new in names.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    position = torch.randn(1, 1, 48)
    state |= {"pos_embed": torch.cat([position, state["pos_embed"]], 1), "cls_token": state["cls_token"] - position}
    torch.save(state | {"mask_token": torch.ones(1, 48)}, tmp_path / "dinov2.pth")
    x = pixels(32, 32)
    assert_same(
        logits(load(str(tmp_path / "dinov2.pth"), arch="vit_giant_patch14_reg4_dinov2"), x), module_logits(module, x)
    )


# --------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize("family", ["timm", "timm distilled", "transformers", "torchvision"])
def test_every_tensor_matters(family, tmp_path):
    """Changing any one tensor breaks the agreement: nothing is ignored, and the comparison can fail."""
    if family == "transformers":
        module = transformers_model("Dinov2WithRegistersForImageClassification")
        folder = save_transformers(module, tmp_path)
    elif family == "torchvision":
        module = torchvision_model()
        save_file(module.state_dict(), tmp_path / "model.safetensors")
        folder = tmp_path / "model.safetensors"
    else:
        kwargs = {} if "distilled" in family else {"qk_norm": True, "reg_tokens": 2, "init_values": 1.0}
        name = "deit_tiny_distilled_patch16_224" if "distilled" in family else "vit_base_patch16_224"
        module = timm_model(name, **kwargs)
        folder = save_timm(module, tmp_path)
    arch = "vit_b_16" if family == "torchvision" else None
    x = pixels(32, 32)
    theirs = (transformers_logits if family == "transformers" else module_logits)(module, x)
    assert_same(logits(load(str(folder), arch=arch), x), theirs)
    file = tmp_path / "model.safetensors"
    for name, tensor in load_file(file).items():
        if name.endswith("mask_token"):
            continue
        edit(file, {name: tensor + 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))})
        ours = logits(load(str(folder), arch=arch), x)
        # The softmax does not see what k's bias adds to every key alike.
        silent = name.endswith(("key.bias", "k_norm.bias"))
        assert (np.abs(ours - theirs).max() > 1e-4) != silent, name
        edit(file, {name: tensor})


# --------------------------------------------------------------------------- at another image size


@pytest.mark.parametrize("size", [24, 40, 56, (24, 56), (33, 47)])
@pytest.mark.parametrize(
    "case", ["vit", "no class token", "registers, positions on all tokens", "deit III", "deit, distilled"]
)
def test_timm_positions_are_resampled_as_timm_does(case, size, tmp_path):
    name, kwargs = TIMM[case]
    module = timm_model(name, **kwargs)
    folder = save_timm(module, tmp_path)
    model = load(str(folder), image_size=size)
    module.set_input_size(img_size=size)
    x = pixels(*model.spec.image_size)
    assert model.preprocess.size == model.spec.image_size == (size if isinstance(size, tuple) else (size, size))
    assert_same(logits(model, x), module_logits(module, x))


@pytest.mark.parametrize("size", [24, 56, (24, 56)])
@pytest.mark.parametrize("case", ["vit", "deit", "dinov2", "dinov2 with registers"])
def test_transformers_positions_are_resampled_as_transformers_does(case, size, tmp_path):
    kind, settings = TRANSFORMERS[case]
    module = transformers_model(kind, **settings)
    model = load(str(save_transformers(module, tmp_path)), image_size=size)
    x = pixels(*model.spec.image_size)
    kwargs = {} if "dinov2" in case else {"interpolate_pos_encoding": True}
    assert_same(logits(model, x), transformers_logits(module, x, **kwargs))


@pytest.mark.parametrize("size", [24, 56])
def test_torchvision_positions_are_resampled_as_torchvision_does(size, tmp_path):
    module = torchvision_model()
    save_file(module.state_dict(), tmp_path / "vit.safetensors")
    model = load(str(tmp_path / "vit.safetensors"), arch="vit_b_16", image_size=size)
    from torchvision.models.vision_transformer import interpolate_embeddings

    other = torchvision_model(image_size=size)
    other.load_state_dict(interpolate_embeddings(size, 8, module.state_dict()))
    x = pixels(size, size)
    assert_same(logits(model, x), module_logits(other, x))


def test_resamplings_differ():
    """Negative control: the three rules are not interchangeable, and the same grid is left alone."""
    pos = np.random.default_rng(0).standard_normal((36, 4)).astype(np.float32)
    results = [resample(pos, (6, 6), (4, 5), rule) for rule in ("antialias", "plain", "corners")]
    assert all(r.shape == (20, 4) for r in results)
    assert min(np.abs(a - b).max() for a, b in zip(results, results[1:] + results[:1], strict=True)) > 0.05
    assert resample(pos, (6, 6), (6, 6), "plain") is pos


def test_square_positions_give_the_size_of_a_bare_file(tmp_path):
    module = timm_model("vit_tiny_patch16_224", img_size=48)
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    assert load(str(tmp_path / "vit.pth"), arch="vit_tiny_patch16_224").spec.image_size == (48, 48)


# --------------------------------------------------------------------------- the architecture table


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_row_is_what_timm_builds(name):
    timm = peers.import_timm()
    row = ARCHITECTURES[name]
    module = timm.create_model(name, depth=1, device="meta")
    cfg = timm.get_pretrained_cfg(name)
    block = module.blocks[0]
    norm = module.norm if isinstance(module.norm, torch.nn.LayerNorm) else module.fc_norm
    assert type(block) is timm.models.vision_transformer.Block and norm.eps == 1e-6 and not module.pool_include_prefix
    mlp = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "SiLU": "swiglu"}[type(block.mlp.act).__name__]
    assert (row.heads, row.image_size, row.pool, row.mlp) == (
        block.attn.num_heads,
        module.patch_embed.img_size[0],
        module.global_pool,
        mlp,
    )
    resize = {"center": "shorter", "squash": "exact"}[cfg.crop_mode]
    assert (*row.pixels, row.crop, row.resize, row.interpolation) == (
        cfg.mean,
        cfg.std,
        cfg.crop_pct,
        resize,
        cfg.interpolation,
    )
