"""Files of every kind, what they say about images and classes, and vitrim's own format: save and load lose nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calibration.preprocess import apply
from compressor.checkpoint import describe, load, save
from compressor.checkpoint.images import crop_ratio
from compressor.checkpoint.positions import resample
from compressor.errors import CheckpointError, ConfigError
from compressor.spec import Preprocess
from compressor.vit import build
from tests import peers
from tests.core.checkpoints import (
    assert_same,
    config,
    edit,
    logits,
    module_logits,
    pixels,
    save_timm,
    save_transformers,
    timm_model,
    transformers_logits,
    transformers_model,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in timm_model("vit_tiny_patch16_224").state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file({name: tensor.float() for name, tensor in state.items()}, tmp_path / "b.safetensors")
    a, b = (load(str(tmp_path / f"{name}.safetensors"), arch="vit_tiny_patch16_224") for name in "ab")
    assert all(np.array_equal(a.weights[name], b.weights[name]) for name in b.weights)


def test_timm_wrapped_by_transformers_is_equal(tmp_path):
    module = timm_model("deit_tiny_patch16_224")
    folder = save_timm(module, tmp_path)
    edit(
        folder / "model.safetensors",
        {f"timm_model.{n}": t for n, t in module.state_dict().items()} | dict.fromkeys(module.state_dict()),
    )
    config(folder / "config.json", model_type="timm_wrapper")
    x = pixels(32, 32)
    assert_same(logits(load(str(folder)), x), module_logits(module, x))


def test_folder_without_config_is_a_bare_file(tmp_path):
    folder = save_timm(timm_model("deit_tiny_patch16_224"), tmp_path)
    expected = load(str(folder))
    (folder / "config.json").unlink()
    model = load(str(folder), arch="deit_tiny_patch16_224")
    assert all(np.array_equal(model.weights[n], w) for n, w in expected.weights.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module._orig_mod.model.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": state, "args": __import__("argparse").Namespace(lr=0.1), "optimizer": {"step": 1}},
    ],
    ids=["model", "state_dict and module", "compiled", "compiled, parallel", "three wrappers", "with options"],
)
def test_training_checkpoints_are_unwrapped(wrap, tmp_path):
    state = timm_model("vit_tiny_patch16_224").state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save(wrap(state), tmp_path / "wrapped.pth.tar")
    plain = load(str(tmp_path / "plain.pth"), arch="vit_tiny_patch16_224")
    wrapped = load(str(tmp_path / "wrapped.pth.tar"), arch="vit_tiny_patch16_224")
    assert all(np.array_equal(plain.weights[name], wrapped.weights[name]) for name in plain.weights)
    assert plain.origin.sha256 != wrapped.origin.sha256


def test_model_owns_its_memory(tmp_path):
    """The file may be replaced while the model lives."""
    save_file(timm_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    model = load(str(tmp_path / "vit.safetensors"), arch="vit_tiny_patch16_224")
    before = model.weights["blocks.0.fc1.weight"].copy()
    with (tmp_path / "vit.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "vit.safetensors").stat().st_size))
    assert np.array_equal(model.weights["blocks.0.fc1.weight"], before)


def test_pytorch_bin_folder_is_read(tmp_path):
    folder = save_timm(timm_model("deit_tiny_patch16_224"), tmp_path)
    expected = load(str(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert all(np.array_equal(load(str(folder)).weights[n], w) for n, w in expected.weights.items())


def test_deit_tiny_has_its_published_size(tmp_path):
    module = peers.import_timm().create_model("deit_tiny_patch16_224")
    save_timm(module, tmp_path)
    facts = describe(load(str(tmp_path)))
    assert facts["params"] == 5_717_416  # DeiT, Touvron et al. 2020, table 1: 5.7 M
    # 1.2537e9 of the blocks and the patch embedding (doctest of VitSpec.macs), and the head's 192 x 1000
    assert facts["macs"] == 1_253_683_200 == 12 * 12 * 197 * 192**2 + 12 * 2 * 197**2 * 192 + 196 * 192 * 768 + 192_000
    assert facts["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert facts["blocks"][11] == {
        "heads": 3,
        "qk_dim": 64,
        "v_dim": 64,
        "mlp_dim": 768,
        "mlp": "gelu",
        "qk_norm": False,
    }
    assert (
        facts["depth"] == 12 and facts["family"] == "timm" and json.loads(json.dumps(facts))["image_size"] == [224, 224]
    )


def test_demo_is_the_embedded_model():
    model = load("demo")
    assert model.origin.name == "demo" and model.spec.image_size == (28, 28) and len(model.spec.blocks) == 9
    assert model.preprocess.channels == "L" and model.labels[9] == "Ankle boot"


def test_timm_download_refuses_in_one_sentence(monkeypatch):
    peers.import_timm()
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"timm:deit_tiny_patch16_224: timm must have its weights and reach them, got: "
    ):
        load("timm:deit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"got 'deit_tny_patch16_224'"):
        load("timm:deit_tny_patch16_224")
    assert logging.getLogger("huggingface_hub").level != logging.CRITICAL


def test_timm_pretrained_model_is_equal(monkeypatch):
    """`timm:NAME` where the weights are in reach: timm's own loader is replaced by random weights of the same module."""
    timm = peers.import_timm()
    module = timm_model("deit_tiny_patch16_224", num_heads=3)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: module)
    x = pixels(32, 32)
    model = load("timm:deit_tiny_patch16_224.fb_in1k")
    assert_same(logits(model, x), module_logits(module, x))
    assert model.origin.name == "deit_tiny_patch16_224" and len(model.origin.sha256) == 64


# --------------------------------------------------------------------------- save and load


def assert_identical(a, b):
    assert (a.spec, a.preprocess, a.labels) == (b.spec, b.preprocess, b.labels)
    assert a.weights.keys() == b.weights.keys()
    assert all(a.weights[name].tobytes() == b.weights[name].tobytes() for name in a.weights)


ROUND_TRIPS = {
    "rectangular patches, gray": ("vit_base_patch16_224", {"patch_size": (5, 9), "img_size": (31, 29), "in_chans": 1}),
    "qk norm": ("vit_base_patch16_224", {"qk_norm": True, "embed_dim": 21}),
    "packed swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 2.5}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 27, "patch_size": 6}),
    "features": ("vit_tiny_patch16_224", {"num_classes": 0}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip_is_exact(case, tmp_path):
    name, kwargs = ROUND_TRIPS[case]
    model = load(str(save_timm(timm_model(name, **kwargs), tmp_path / "timm")))
    model = replace(model, labels=tuple(f"class {i}" for i in range(model.spec.num_classes)))
    save(model, tmp_path / "ours")
    again = load(str(tmp_path / "ours"))
    assert_identical(model, again)
    assert again.params == model.params and again.origin.name == name and again.origin.family == "vitrim"
    assert again.origin.sha256 == hashlib.sha256((tmp_path / "ours" / "model.safetensors").read_bytes()).hexdigest()
    save(again, tmp_path / "twice")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    wrong = replace(model, weights={**model.weights, "pos": model.weights["pos"] + np.float32(1e-6)})
    with pytest.raises(AssertionError):
        assert_identical(wrong, again)


def test_round_trip_of_unequal_blocks_and_another_size(tmp_path):
    demo = load("demo")
    blocks = (replace(demo.spec.blocks[0], qk_dim=5, mlp_dim=7), replace(demo.spec.blocks[1], heads=2, v_dim=11))
    spec = replace(demo.spec, blocks=blocks)
    weights = {name: tensor.detach().numpy() for name, tensor in build(spec).named_parameters()}
    model = demo.with_weights(spec, weights)
    save(model, tmp_path)
    again = load(str(tmp_path))
    assert_identical(model, again)
    assert again.params == spec.params()
    larger = load(str(tmp_path), image_size=(32, 40))
    assert larger.spec.grid == (8, 10) and larger.preprocess.size == (32, 40)
    np.testing.assert_array_equal(larger.weights["pos"], resample(model.weights["pos"], (7, 7), (8, 10), "antialias"))


# --------------------------------------------------------------------------- preprocessing and labels


def photo(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


PROCESSORS = {
    "vit": ("ViT", {"size": {"height": 32, "width": 32}}),
    "vit, one number": ("ViT", {"size": 32, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}),
    "vit, not normalised": ("ViT", {"size": 32, "do_normalize": False}),
    "vit, another scale": ("ViT", {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]}),
    "vit, not rescaled": ("ViT", {"size": 32, "do_rescale": False, "image_mean": [127.0, 120.0, 110.0]}),
    "deit": ("DeiT", {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}}),
    "dinov2": ("Dinov2", {"size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 32}, "resample": 1}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_transformers_processor_is_followed(case, tmp_path):
    """A photo prepared by our contract is what the image processor of the same folder makes of it."""
    name, settings = PROCESSORS[case]
    folder = save_transformers(transformers_model(f"{name}ForImageClassification"), tmp_path)
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = {"ViT": ViTImageProcessorPil, "DeiT": DeiTImageProcessorPil, "Dinov2": BitImageProcessorPil}[name](
        **settings
    )
    processor.save_pretrained(folder)
    contract = load(str(folder)).preprocess
    for image in (photo(50, 70), photo(71, 33)):
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        # transformers multiplies by the factor where we divide by 255: one rounding of numbers up to 255 / std.
        np.testing.assert_allclose(apply(contract, image), theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_crop_ratio_always_gives_the_resized_side_back():
    for crop in range(1, 400, 9):
        for resized in range(crop, 520):
            ratio = crop_ratio(crop, resized)
            assert 0 < ratio <= 1 and math.floor(crop / ratio) == resized
    assert math.floor(1 / (1 / 93)) != 93  # the plain quotient would not do


def test_transformers_defaults_are_those_of_the_family(tmp_path):
    """Without a processor file: the documented defaults, at the model's own size."""
    expected = {
        "ViT": Preprocess((32, 32), 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, resize="exact"),
        "DeiT": Preprocess((32, 32), 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3, resize="exact"),
        "Dinov2": Preprocess((32, 32), 0.875, "bicubic"),
    }
    for name, contract in expected.items():
        folder = save_transformers(transformers_model(f"{name}ForImageClassification"), tmp_path / name)
        assert load(str(folder)).preprocess == contract


def test_dinov2_runs_at_its_processors_size(tmp_path):
    module = transformers_model("Dinov2ForImageClassification", image_size=56)
    folder = save_transformers(module, tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 36}, "crop_size": 32}))
    model = load(str(folder))
    assert model.spec.image_size == (32, 32) and model.preprocess.size == (32, 32)
    x = pixels(32, 32)
    assert_same(logits(model, x), transformers_logits(module, x))
    assert load(str(folder), image_size=40).spec.image_size == (40, 40)


def test_timm_preprocessing_and_labels_are_followed(tmp_path):
    folder = save_timm(timm_model("vit_tiny_patch16_224"), tmp_path)
    cfg = {"crop_pct": 0.8, "crop_mode": "squash", "interpolation": "lanczos", "mean": [0.1, 0.2, 0.3], "std": [0.4]}
    config(folder / "config.json", label_names=list("abcde"), **{f"pretrained_cfg__{k}": v for k, v in cfg.items()})
    model = load(str(folder))
    assert model.labels == tuple("abcde")
    assert model.preprocess == Preprocess((32, 32), 0.8, "lanczos", (0.1, 0.2, 0.3), (0.4,) * 3, resize="exact")
    config(folder / "config.json", label_names={str(i): f"n{i}" for i in reversed(range(5))})
    assert load(str(folder)).labels == ("n0", "n1", "n2", "n3", "n4")


def test_timm_labels_of_a_model_without_classifier_are_none(tmp_path):
    folder = save_timm(timm_model("vit_tiny_patch16_224", num_classes=0), tmp_path)
    config(folder / "config.json", num_classes=0, label_names=list("abcde"))
    assert load(str(folder)).labels == ()


def test_bare_file_gets_the_preprocessing_of_its_name(tmp_path):
    torch.save(timm_model("deit_tiny_patch16_224").state_dict(), tmp_path / "deit.pth")
    assert load(str(tmp_path / "deit.pth"), arch="deit_tiny_patch16_224").preprocess == Preprocess(
        (32, 32), 0.9, "bicubic"
    )


def test_transformers_labels_are_in_order(tmp_path):
    folder = save_transformers(transformers_model("ViTForImageClassification"), tmp_path)
    assert load(str(folder)).labels == ()  # LABEL_0 ... are placeholders
    config(folder / "config.json", id2label={str(i): f"name {i}" for i in reversed(range(5))})
    assert load(str(folder)).labels == tuple(f"name {i}" for i in range(5))


def test_fine_tuned_with_average_pool_is_recognised_by_fc_norm(tmp_path):
    """MAE fine-tuning: the name says token, the tensors say fc_norm."""
    module = timm_model("vit_tiny_patch16_224", global_pool="avg")
    torch.save({"model": module.state_dict()}, tmp_path / "mae.pth")
    x = pixels(32, 32)
    assert_same(logits(load(str(tmp_path / "mae.pth"), arch="vit_tiny_patch16_224"), x), module_logits(module, x))
