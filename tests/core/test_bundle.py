"""Opening a bundle trusts nothing: whatever its manifest, its golden outputs or its archive say, the answer is one sentence."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import targets
from compressor.bundle import Bundle, is_bundle
from compressor.errors import BundleError
from compressor.inference import Source, profile_source, verify_bundle
from compressor.output import zip_folder
from targets import null
from tests.core.bundles import edited, forged, sealed

ENTRY = {"sha256": "0" * 64, "size": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed(tmp_path_factory.mktemp("bundle") / "b", "null")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "b")


def used(path: Path) -> str:
    """Everything a command does with a bundle; its answers as JSON."""
    checked = verify_bundle(path, None)
    with Bundle.open(path) as opened:
        name = opened.default_target
        best = opened.top(np.full((32, 32, 3), 128, np.uint8), 5)
        found = {"target": name, "top": best, "spec": opened.spec.num_classes, "on": len(opened.calibrated_on)}
    return json.dumps([checked.data, found], allow_nan=False)


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        used(path)
    assert "\n" not in str(caught.value) and caught.value.exit_code in (1, 2) and caught.value.hint
    return str(caught.value)


def test_the_untouched_bundle_is_used(bundle: Path) -> None:
    assert '"passed": true' in used(bundle)  # the control of everything below
    assert '"passed": true' in used(forged(edited(bundle, lambda m: m)))  # and of the tools that edit


MANIFESTS: Mapping[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "NUL in a name": (lambda m: m["files"].update({"a\0b": ENTRY}), "must be text of at most 255 bytes"),
    "half a character": (lambda m: m["files"].update({"\ud800": ENTRY}), "not valid|must be text"),
    "a long name": (lambda m: m["files"].update({"a" * 300: ENTRY}), "must be text of at most 255 bytes"),
    "a long path": (lambda m: m["files"].update({"a/" * 3000: ENTRY}), "must be text of at most 255 bytes"),
    "outside": (lambda m: m["files"].update({"../a": ENTRY}), "must stay inside"),
    "no targets": (lambda m: m.update(targets={}), "targets is not valid"),
    "no inputs": (lambda m: m["targets"]["null"].update(inputs=[]), "inputs is not valid"),
    "no outputs": (lambda m: m["targets"]["null"].update(outputs=[]), "outputs is not valid"),
    "no files": (lambda m: m["targets"]["null"].update(files=[]), "files is not valid"),
    "scalar input": (lambda m: m["targets"]["null"]["inputs"][0].update(shape=[]), "shape is not valid"),
    "one size": (lambda m: m["preprocess"].update(size=[28]), "preprocess.size"),
    "other size": (lambda m: m["preprocess"].update(size=[28, 28]), r"preprocess must make \(32, 32\) x 3"),
    "mean of text": (lambda m: m["preprocess"].update(mean=["a"] * 3), "preprocess.mean"),
    "mean of NaN": (lambda m: m["preprocess"].update(mean=[float("nan")] * 3), "preprocess.mean"),
    "std of zero": (lambda m: m["preprocess"].update(std=[0.0] * 3), "std must be positive"),
    "interpolation": (lambda m: m["preprocess"].update(interpolation="zzz"), "preprocess.interpolation"),
    "unknown key": (lambda m: m["preprocess"].update(zzz=1), "preprocess.zzz"),
    "size of text": (lambda m: m["spec"].update(image_size="xx"), "spec.image_size"),
    "blocks of number": (lambda m: m["spec"].update(blocks=5), "spec.blocks"),
    "no heads": (lambda m: m["spec"]["blocks"][0].update(heads=0), "heads must be at least 1"),
    "unknown block key": (lambda m: m["spec"]["blocks"][0].update(zzz=1), "spec.blocks.0.zzz"),
    "few labels": (lambda m: m.update(labels=["a"]), "labels must name 10 classes, got 1"),
    "golden not listed": (lambda m: m["files"].pop("golden.npz"), "'golden.npz' must be listed"),
    "model not listed": (lambda m: m["files"].pop("model.safetensors"), "'model.safetensors' must be listed"),
    "config not listed": (lambda m: m["files"].pop("config.json"), "'config.json' must be listed"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(bundle: Path, name: str) -> None:
    change, said = MANIFESTS[name]
    edited(bundle, change)
    with pytest.raises(BundleError, match=said):
        used(bundle)
    refused(bundle)


IMAGES = np.zeros((2, 3, 32, 32), np.float32)
ARRAYS: Mapping[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({"inputs": None}, r"inputs \(n, 3, 32, 32\), got none"),
    "empty inputs": ({"inputs": IMAGES[:0]}, "inputs"),
    "small inputs": ({"inputs": IMAGES[..., :8]}, "inputs"),
    "NaN inputs": ({"inputs": IMAGES * np.nan}, "finite numbers"),
    "inputs of text": ({"inputs": np.full(IMAGES.shape, "a")}, "finite numbers"),
    "narrow outputs": ({"outputs.null": np.zeros((2, 5), np.float32)}, r"shape \(2, 10\) in 'outputs.null'"),
    "fewer outputs": ({"outputs.null": np.zeros((1, 10), np.float32)}, r"shape \(2, 10\) in 'outputs.null'"),
    "NaN outputs": ({"outputs.null": np.full((2, 10), np.nan)}, "finite numbers"),
    "no outputs": ({"outputs.null": None}, "outputs of target 'null'"),
    "NaN tolerance": ({"tolerance.null": np.float64("nan")}, "tolerance.null"),
    "endless tolerance": ({"tolerance.null": np.float64("inf")}, "tolerance.null"),
    "many tolerances": ({"tolerance.null": np.ones(2)}, "tolerance.null"),
    "reference of text": ({"reference": np.full((2, 10), "a")}, "'reference'"),
    "objects": ({"reference": np.array([print])}, "must be readable"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_forged_golden_outputs_are_refused(bundle: Path, name: str) -> None:
    arrays, said = ARRAYS[name]
    forged(bundle, **arrays)
    with pytest.raises(BundleError, match=said):
        used(bundle)
    refused(bundle)


def test_a_tolerance_of_ones_own_is_seen(bundle: Path) -> None:
    """Golden outputs that nobody lists could say what they like; listed ones change a digest."""
    with np.load(bundle / "golden.npz") as stored:
        np.savez(bundle / "golden.npz", **{**stored, "outputs.null": -stored["outputs.null"], "tolerance.null": 1e9})
    assert "it was changed" in refused(bundle)
    edited(bundle, lambda m: m["files"].pop("golden.npz"))
    assert "must be listed" in refused(bundle)


def test_golden_outputs_that_are_missing_are_named(bundle: Path) -> None:
    edited(bundle, lambda m: m["files"].pop("golden.npz"))
    (bundle / "golden.npz").unlink()
    assert "golden.npz must be readable" in refused(bundle)
    assert Bundle.open(bundle).top(np.zeros((32, 32, 3), np.uint8), 1)  # a device may do without


def test_a_file_that_is_read_by_nobody_may_lie_there(bundle: Path) -> None:
    (bundle / "manifest.json.sig").write_text("")
    (bundle / "notes.txt").write_text("hello")
    assert '"passed": true' in used(bundle)


# --------------------------------------------------------------------------- what is a bundle


def test_a_zip_is_a_bundle_under_any_name(bundle: Path, tmp_path: Path) -> None:
    zip_folder(bundle, tmp_path / "packed")
    with zipfile.ZipFile(tmp_path / "nested", "w") as archive:
        for file in filter(Path.is_file, bundle.rglob("*")):
            archive.write(file, Path("b") / file.relative_to(bundle))
    for name in ("b", "packed", "nested"):
        assert is_bundle(str(tmp_path / name))
        assert profile_source(Source(str(tmp_path / name), "null"), batch=1, per_op=False)["target"] == "null"


def test_what_is_not_a_bundle(tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    assert zipfile.is_zipfile(tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "deep", "w") as archive:
        archive.writestr("a/b/manifest.json", "{}")
    whole = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "broken").write_bytes(whole[len(whole) // 2 :])
    (tmp_path / "folder").mkdir()
    for name in ("weights.pth", "deep", "broken", "folder", "missing", "a\0b", "x" * 300):
        assert not is_bundle(str(tmp_path / name))
    for name in ("demo", "timm:vit_tiny", ""):
        assert not is_bundle(name)


# --------------------------------------------------------------------------- using one


def test_predictions_take_the_threads_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], null.open
    monkeypatch.setattr(null, "open", lambda artifact, threads=1: (opened.append(threads), real(artifact, threads))[1])
    here, picture = Bundle.open(bundle), np.zeros((32, 32, 3), np.uint8)
    for _ in range(2):
        here.session("null", 4)
        here.top(picture, 5, "null", threads=4)
        here.predict(picture, threads=4)
        here.logits(here.golden["inputs"], "null", threads=4)
    assert opened == [4]
    here.top(picture)
    assert opened == [4, 1]


def test_run_opens_one_session(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from compressor import console
    from compressor.cli import app

    opened, real = [], null.open
    monkeypatch.setattr(null, "open", lambda artifact, threads=1: (opened.append(threads), real(artifact, threads))[1])
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "x.png")
    monkeypatch.setattr("sys.argv", ["vitrim", "run", str(bundle), str(tmp_path / "x.png"), "--threads", "3", "--json"])
    assert console.main(app) == 0 and json.loads(capsys.readouterr().out)["target"] == "null"
    assert opened == [3]


def test_the_default_target_is_looked_for_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], targets.names
    monkeypatch.setattr(targets, "names", lambda: (asked.append(1), real())[1])
    opened, picture = Bundle.open(bundle), np.zeros((32, 32, 3), np.uint8)
    for _ in range(3):
        opened.predict(picture)
    assert len(asked) == 1
