"""Models from bundles, whole and damaged, and what is too large for one file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from compressor import checkpoint
from compressor.bundle import Bundle
from compressor.errors import BundleError, UnsupportedModel
from compressor.loading import load_model, require_exportable
from compressor.output import zip_folder
from compressor.types import BlockSpec, VitSpec
from tests.core.test_build_plan import bundle as make_bundle
from tests.models import BASE


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zipped")
    zip_folder(make_bundle(folder / "b", "tensorrt"), folder / "b.zip")
    return folder / "b.zip"


def test_a_zip_gives_the_model_of_its_folder(zipped: Path) -> None:
    with Bundle.open(zipped) as opened:
        want, unpacked = checkpoint.load(str(opened.root)), opened.root
    got = load_model(str(zipped))
    assert got.spec == want.spec and all((got.weights[n] == w).all() for n, w in want.weights.items())
    assert not unpacked.exists()


def test_a_damaged_zip_is_called_damaged(zipped: Path, tmp_path: Path) -> None:
    whole, refused = zipped.read_bytes(), 0
    for position in np.random.default_rng(0).integers(0, len(whole), 60):
        (tmp_path / "b.zip").write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            Bundle.open(tmp_path / "b.zip")
        except BundleError:
            refused += 1
    assert refused > 50  # some bytes of a zip, such as times, mean nothing


def test_a_zipped_folder_with_the_folder_in_it_is_a_bundle(zipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped) as old, zipfile.ZipFile(tmp_path / "b.zip", "w") as new:
        for name in old.namelist():
            new.writestr(f"b/{name}", old.read(name))
    with Bundle(tmp_path / "b.zip") as inner, Bundle(zipped) as plain:
        assert inner.manifest == plain.manifest
    with zipfile.ZipFile(zipped) as old, zipfile.ZipFile(tmp_path / "two.zip", "w") as new:
        for name in old.namelist():
            new.writestr(f"b/{name}", old.read(name))
        new.writestr("readme.txt", "hello")
    with pytest.raises(BundleError, match="manifest"):
        Bundle(tmp_path / "two.zip")


def test_a_changed_bundle_is_no_model(zipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "b")
    load_model(str(tmp_path / "b"))
    weights = tmp_path / "b/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="it was changed"):
        load_model(str(tmp_path / "b"))


def test_a_newer_bundle_asks_for_a_newer_vitrim(zipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(tmp_path / "b")
    manifest = tmp_path / "b/manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(BundleError, match="a newer vitrim made this bundle") as caught:
        Bundle(tmp_path / "b")
    assert caught.value.hint == "Update vitrim."


def test_another_compression_is_refused(zipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(zipped) as old, zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(BundleError, match="compression method"):
        Bundle.open(tmp_path / "b.zip")


def test_a_model_beyond_one_file_is_refused_by_its_size() -> None:
    require_exportable(BASE)
    huge = VitSpec((224, 224), (14, 14), 3, 1280, (BlockSpec(16, 80, 80, 5120),) * 32, num_classes=1000)
    with pytest.raises(UnsupportedModel, match=r"less than 2 GiB.*got 2\.4 GiB"):
        require_exportable(huge)
