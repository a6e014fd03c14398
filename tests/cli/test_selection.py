"""Images chosen for a device that sends a description of its own and nothing else."""

import json

import numpy as np
import pytest

from tests.cli.conftest import vitrim


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Images of a device, and the file it sends."""
    folder = tmp_path_factory.mktemp("device")
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    done = vitrim("fingerprint", folder / "images.npz", "--out", folder / "sent.json", "--components", 2, "--json")
    assert done.code == 0, done.err
    assert done.json["images"] == 24 and done.json["components"] == 2
    return folder / "sent.json"


def test_the_file_holds_the_mixture_and_no_image(device):
    content = json.loads(device.read_text())
    assert set(content) == {"schema", "model", "images", "weights", "means", "variances"}
    assert len(content["weights"]) == 2 and device.stat().st_size < 24 * 28 * 28


def test_compress_calibrates_on_matching_images(device, tmp_path):
    arguments = ("--precision", "fp32", "--calib-size", 16, "--match", device, "--no-cache", "--json")
    done = vitrim("compress", "demo", *arguments, "--out", tmp_path / "b")
    assert done.code == 0, done.err
    assert "select images" in done.err
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["calibration"]["count"] == 16 and manifest["recipe"]["match"] == str(device)


def test_a_fingerprint_of_another_model_is_refused(device, tmp_path):
    content = json.loads(device.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "model": "0" * 64}))
    done = vitrim("compress", "demo", "--match", other, "--out", tmp_path / "b")
    assert done.code == 2 and "must be made with this model" in done.err
    assert not (tmp_path / "b").exists()


def test_more_components_than_images_are_refused(device, tmp_path):
    done = vitrim("fingerprint", device.parent / "images.npz", "--components", 25, "--out", tmp_path / "x.json")
    assert done.code == 2 and "components must be 1 to 24" in done.err
    assert not (tmp_path / "x.json").exists()


def test_an_unknown_selector_is_refused_by_name(tmp_path):
    done = vitrim("compress", "demo", "--select", "kcentre", "--out", tmp_path / "b")
    assert done.code == 2 and "k_centre" in done.err
