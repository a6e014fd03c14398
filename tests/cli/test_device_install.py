"""What a device does: `pip install vitrim` into an empty environment, no torch, and a bundle that runs there."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Python of a clean environment in which only the built wheel and its own requirements are installed."""
    folder = tmp_path_factory.mktemp("device")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    (wheel,) = folder.glob("vitrim-*.whl")
    command = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def on_device(python, *arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_torch_is_not_there(device, tmp_path):
    listed = on_device(device, "-m", "pip", "list", "--format", "json", cwd=tmp_path)
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "vitrim" in names and not names & {"torch", "onnx", "onnx-ir", "safetensors", "scikit-learn", "openvino"}


def test_the_bundle_runs_verifies_and_profiles(device, bundle, image, tmp_path):
    path, label = image
    done = on_device(device, "-m", "compressor", "run", bundle, path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    labels = json.loads((bundle / "manifest.json").read_text())["labels"]
    assert result["target"] == "ort" and result["results"][0]["top"][0]["label"] == labels[label]
    done = on_device(device, "-m", "compressor", "verify", bundle, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checks = {c["target"]: c["passed"] for c in json.loads(done.stdout)["targets"]}
    assert checks == {"ort": True, "openvino": None}  # openvino is not installed there, and is said to be skipped
    done = on_device(device, "-m", "compressor", "profile", bundle, "--target", "ort", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_three_lines_of_python(device, bundle, image, tmp_path):
    code = (
        f"from compressor.bundle import Bundle; b = Bundle.open({str(bundle)!r}); "
        f"print(b.top({str(image[0])!r}, 1)[0][0]); import sys; assert 'torch' not in sys.modules"
    )
    done = on_device(device, "-c", code, cwd=tmp_path)
    labels = json.loads((bundle / "manifest.json").read_text())["labels"]
    assert done.returncode == 0 and done.stdout.strip() == labels[image[1]], done.stderr


def test_what_needs_torch_says_what_to_install(device, tmp_path):
    done = on_device(device, "-m", "compressor", "compress", "demo", "--out", tmp_path / "b", "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 3 and "vitrim[compress]" in error["hint"] and "Traceback" not in done.stderr
