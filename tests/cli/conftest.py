"""One real bundle of the embedded model, made by the real command, shared by the tests of this folder."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor import console
from compressor.cli import app

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def vitrim(*arguments, cwd=None, env=None, timeout=1500) -> Done:
    """Run the command line as a user would, one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """An empty stage cache of its own."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def run(capsys, monkeypatch, cache):
    """The command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache["XDG_CACHE_HOME"])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vitrim", *map(str, arguments)])
        code = console.main(app)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory, cache):
    """The command of the issue, its answer, and its bundle."""
    bundle = tmp_path_factory.mktemp("bundle") / "b"
    done = vitrim(
        *("compress", "demo", "--mlp-ratio", 0.5, "--qk-ratio", 0.5, "--pruner", "corp", "--precision", "w8a8"),
        *("--target", "ort", "--target", "openvino", "--out", bundle, "--json"),
        env=cache,
    )
    assert done.code == 0, done.err
    return done.json, bundle


@pytest.fixture(scope="session")
def bundle(made):
    return made[1]


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The first embedded evaluation image as a PNG."""
    path = tmp_path_factory.mktemp("image") / "boot.png"
    with np.load(ROOT / "compressor/demo/evaluation.npz") as data:
        Image.fromarray(data["images"][0, :, :, 0]).save(path)
        return path, int(data["labels"][0])
