"""`tools/train_vit.py` trains on IDX files and writes a folder that the product reads."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
import torch

from calibration.data import batches, open_images
from compressor.checkpoint import load
from compressor.vit import to_torch

TOOLS = Path(__file__).parents[2] / "tools"


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path):
    """The embedded images, 300 to train on and 100 to test on."""
    images = open_images("demo")
    pixels = np.stack(images.items)[..., 0]
    for name, part in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pixels[part])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", images.labels[part].astype(np.uint8))
    return tmp_path


def train(folder: Path, *options: str) -> Path:
    out = folder / "out"
    shape = ["--dim", "16", "--depth", "2", "--heads", "2", "--patch", "7", "--val", "44", "--batch", "64"]
    command = [sys.executable, str(TOOLS / "train_vit.py"), "--data", str(folder), "--out", str(out), *shape, *options]
    run(command, check=True, capture_output=True)
    return out


def test_the_tool_writes_what_the_product_reads(idx_folder, monkeypatch):
    out = train(idx_folder, "--epochs", "2", "--opt", "muon", "--half")
    model = load(str(out))
    assert model.spec.embed_dim == 16 and len(model.spec.blocks) == 2 and model.labels[9] == "Ankle boot"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["steps"] for entry in log] == [4, 8] and log[-1]["progress"] == 1

    monkeypatch.syspath_prepend(str(TOOLS))
    from safetensors.torch import load_file
    from vit import ViT

    trained = ViT(28, 7, 1, 10, 16, 2, 2)
    trained.load_state_dict({name: w.float() for name, w in load_file(out / "model.safetensors").items()})
    pixels = torch.from_numpy(next(batches(open_images("demo"), model.preprocess, 32)))
    with torch.no_grad():
        ours, theirs = to_torch(model)(pixels), trained(pixels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # float32 rounding of logits of about 1
    assert (trained(pixels * 1.01) - theirs).abs().max() > 1e-5  # and the check can fail
