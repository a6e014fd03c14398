"""A runtime that is installed and does not load, for want of a shared library say, is missing, not a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PACKAGES = {"ort": "onnxruntime", "openvino": "openvino", "ort-cuda": "onnxruntime", "tensorrt": "tensorrt"}
NEEDS = "ImportError('libstdc++.so.6: version GLIBCXX_3.4.29 not found')"
ASK = """
import sys; sys.path.insert(0, {site!r})
import targets
from pathlib import Path
from compressor.errors import VitrimError
from compressor.types import Artifact
target = targets.get({name!r}); state = target.available()
print(state.available, state.reason, "|", state.fix)
try:
    target.open(Artifact({name!r}, Path({file!r}), "", 0, "fp32", (), ()))
except VitrimError as error:
    print(error, error.hint)
"""


def broken(folder: Path, package: str, error: str = NEEDS) -> Path:
    """A folder for the path, with a `package` whose import fails."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(f"raise {error}\n")
    return folder


def said(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("error", [NEEDS, "OSError('libcudart.so.12: cannot open shared object file')"])
def test_a_runtime_that_does_not_load_is_unavailable(name: str, error: str, tmp_path: Path) -> None:
    site, package = broken(tmp_path / "site", PACKAGES[name], error), PACKAGES[name]
    found = said(ASK.format(site=str(site), name=name, file=str(tmp_path / "no file")))
    state, *refusal = found.splitlines()
    assert state.startswith(f"False {package} is installed but does not load: lib")
    if name in ("ort", "openvino"):  # the others name the file or the GPU first
        assert refusal[0].startswith(f"Target {name!r} must have {package} that loads: {package} is installed but")


def test_doctor_and_run_go_on_with_what_loads(tmp_path: Path) -> None:
    from tests.core.bundles import sealed

    bundle = sealed(tmp_path / "b", "ort", "null")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "x.png")
    code = """
import sys; sys.path[:0] = [{site!r}]
sys.argv = ["vitrim", *{arguments!r}]
from compressor import console
from compressor.cli import app
sys.exit(console.main(app))
"""
    site = str(broken(tmp_path / "site", "onnxruntime"))
    told = said(code.format(site=site, arguments=["doctor"]))
    assert "missing: onnxruntime is installed but does not load: libstdc++" in told
    run = ["run", str(bundle), str(tmp_path / "x.png"), "--json"]
    assert '"target": "null"' in said(code.format(site=site, arguments=run))
    (tmp_path / "empty").mkdir()
    assert '"target": "ort"' in said(code.format(site=str(tmp_path / "empty"), arguments=run))  # the control
