"""Hostile files: nothing in them is executed, no small file claims large memory, and no damage escapes as another error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.checkpoint import load
from compressor.errors import CheckpointError, VitrimError
from compressor.spec import Model
from tests.core.checkpoints import good_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return good_folders(tmp_path_factory.mktemp("good"))


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_pickle_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    torch.save({"cls_token": Payload(marker)}, tmp_path / "zip.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(marker)))
    torch.save(Payload(marker), tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "raw.pth", "model.bin"):
        with pytest.raises(
            CheckpointError, match=r"must hold tensors only, got Python objects, which are never executed"
        ):
            load(str(tmp_path / name), arch="deit_tiny_patch16_224")
    assert not marker.exists()
    pickle.loads((tmp_path / "raw.pth").read_bytes())  # the payload does work
    assert marker.exists()


def test_damaged_pickles_are_refused(folders, tmp_path):
    good = (folders / "bare.pth").read_bytes()
    bad = {
        "empty.pth": b"",
        "text.pth": b"hello",
        "cut.pth": good[: len(good) // 2],
        "number.pth": pickle.dumps(3),
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}: the file must hold "):
            load(str(tmp_path / name), arch="deit3_small_patch16_224")
    for name, content in {"list.pth": [1, 2], "no tensors.pth": {"epoch": 3}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(
            CheckpointError,
            match=rf"{name}: the (file must hold a state dict, got list|state dict must hold tensors, got none)",
        ):
            load(str(tmp_path / name), arch="deit3_small_patch16_224")


def test_small_files_cannot_claim_large_memory(folders, tmp_path):
    """A tensor expanded from one number, and a compressed archive: both would grow in memory."""
    state = torch.load(folders / "bare.pth", weights_only=True)
    hidden = 10**7
    state["blocks.0.mlp.fc1.weight"] = torch.ones(1, 1).expand(hidden, 24)
    state["blocks.0.mlp.fc1.bias"] = torch.ones(1).expand(hidden)
    state["blocks.0.mlp.fc2.weight"] = torch.ones(1, 1).expand(24, hidden)
    torch.save(state, tmp_path / "expanded.pth")
    assert (tmp_path / "expanded.pth").stat().st_size < 10**6
    with pytest.raises(CheckpointError, match=r"must hold as many numbers as its shape says"):
        load(str(tmp_path / "expanded.pth"), arch="deit3_small_patch16_224")
    with (
        zipfile.ZipFile(folders / "bare.pth") as good,
        zipfile.ZipFile(tmp_path / "zip.pth", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for entry in good.namelist():
            bad.writestr(entry, good.read(entry))
    with pytest.raises(CheckpointError, match=r"must be stored uncompressed, .*, got a compressed archive"):
        load(str(tmp_path / "zip.pth"), arch="deit3_small_patch16_224")


# --------------------------------------------------------------------------- fuzzing


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_damage_never_escapes(data, folders, tmp_path_factory):
    """Flipped and cut bytes of a weight file: a model (the damage hit a number) or a VitrimError, nothing else."""
    name = data.draw(st.sampled_from(["bare.safetensors", "bare.pth"]))
    content = bytearray((folders / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        assert isinstance(load(str(path), arch="deit3_small_patch16_224"), Model)
    except VitrimError as error:
        assert "\n" not in str(error)


WEIRD = [None, True, -1, 0, 1.5, 10**30, float("nan"), "x", "", [], [1], [-3, 2.5], {}, {"0": 1}, [[1]]]


def places(content, above=()):
    """Every key of nested objects, as a path."""
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


@pytest.mark.parametrize("layout", ["timm", "transformers", "vitrim"])
def test_weird_config_values_never_escape(layout, folders, tmp_path):
    """Every value of config.json replaced by every weird one: a model or a VitrimError, nothing else, and quickly."""
    folder = tmp_path / layout
    shutil.copytree(folders / layout, folder)
    original = json.loads((folder / "config.json").read_text())
    refused = 0
    for place in places(original):
        for value in WEIRD:
            content = json.loads(json.dumps(original))
            inner = content
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            (folder / "config.json").write_text(json.dumps(content))
            try:
                assert isinstance(load(str(folder)), Model)
            except VitrimError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50


def test_weird_processor_values_never_escape(folders, tmp_path):
    folder = tmp_path / "transformers"
    shutil.copytree(folders / "transformers", folder)
    keys = [
        "size",
        "crop_size",
        "do_resize",
        "do_center_crop",
        "resample",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
    ]
    for key in [*keys, "image_mean", "image_std"]:
        for value in WEIRD:
            content = {"do_center_crop": True, "crop_size": 32, key: value}
            (folder / "preprocessor_config.json").write_text(json.dumps(content))
            try:
                model = load(str(folder))
            except VitrimError:
                continue
            assert np.isfinite([*model.preprocess.mean, *model.preprocess.std, model.preprocess.crop]).all()
