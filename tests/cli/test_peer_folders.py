"""The main job on folders written by timm and transformers themselves, with images a user might have."""

import numpy as np
import pytest
from PIL import Image

from tests import peers
from tests.cli.conftest import vitrim


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A flat folder of odd-sized photographs: smooth random colours."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        small.resize((50 + i, 70 - i), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return folder


def timm_folder(folder):
    """What timm pushes to a hub: config.json and model.safetensors."""
    timm, torch = peers.import_timm(), pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    model = timm.create_model("deit3_small_patch16_224", **sizes)
    timm.models.save_for_hf(model, folder, model_args=sizes, safe_serialization=True)


def transformers_folder(folder):
    """What transformers saves: config.json, model.safetensors, preprocessor_config.json."""
    transformers, torch = peers.import_transformers(), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2}'
    )


@pytest.mark.parametrize("make", [timm_folder, transformers_folder])
def test_the_main_job(make, photos, tmp_path, cache):
    source = tmp_path / "model"
    source.mkdir()
    make(source)
    facts = vitrim("inspect", source, "--json").json
    assert facts["family"] == make.__name__.removesuffix("_folder") and len(facts["blocks"]) == 2
    out = tmp_path / "b"
    ratios = ("--mlp-ratio", 0.5, "--qk-ratio", 0.5, "--pruner", "corp", "--precision", "w8a8")
    done = vitrim(
        "compress",
        source,
        "--data",
        photos,
        *ratios,
        "--target",
        "ort",
        "--target",
        "openvino",
        "--out",
        out,
        "--json",
        env=cache,
    )
    assert done.code == 0, done.err
    assert done.json["compressed"]["top1"] is None  # no labels, no accuracy
    assert done.json["compressed"]["macs"] < done.json["reference"]["macs"] == facts["macs"]
    assert vitrim("verify", out).code == 0
    assert vitrim("run", out, photos / "00.jpg", "--json").code == 0
    assert vitrim("profile", out, "--target", "openvino", "--per-op", "--json").json["ops"]
