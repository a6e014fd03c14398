"""Runners for real boards, which none of these tests has met.

What is real here: QNN's runner on its x86 emulator, and the layout that RKNN's runner feeds, in the toolkit's simulator. For
`hobot_dnn` and `rknnlite` there is only a stand-in, which checks the shapes, types and layouts that our side hands over, and
plays the vendors' failures; it says nothing about the boards.
"""

from __future__ import annotations

import importlib.machinery
import platform
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.errors import TargetUnavailable
from compressor.lower import lower
from compressor.types import BlockSpec, BuildOptions, VitSpec
from targets import _estimate, _venv, bpu, qnn, rknn
from tests.models import random_model, random_pixels
from tests.npu.bundles import FILES, LOGITS, MODEL, artifact_of, bundle_of
from tests.npu.models import cosine, images, torch_logits


class StandIn:
    """Records what a vendor's library was given, and returns what it is told to."""

    def __init__(self, shape):
        self.given, self.loaded = [], []
        self.output = LOGITS.reshape(1, 10, 1, 1).copy()
        self.shape, self.codes, self.error = shape, {}, None

    def infer(self, array):
        assert isinstance(array, np.ndarray) and array.dtype == np.float32 and array.flags.c_contiguous
        self.given.append(array.copy())
        if self.error is not None:
            raise self.error
        return self.output


def stand_in_for_hobot_dnn(box):
    """``pyeasy_dnn``: load -> models, Model.inputs[0].properties.shape, Model.forward -> tensors with a buffer."""
    properties = types.SimpleNamespace(shape=box.shape, dtype="float32", layout="NCHW")

    def load(path):
        box.loaded.append(path)
        if not Path(path).is_file():
            raise RuntimeError("hbDNNInitializeFromFiles failed")
        tensor = types.SimpleNamespace(properties=properties)
        forward = lambda array: (types.SimpleNamespace(buffer=box.infer(array)),)  # noqa: E731
        return [types.SimpleNamespace(inputs=(tensor,), forward=forward)]

    return {"hobot_dnn": {"pyeasy_dnn": types.SimpleNamespace(load=load)}}


def stand_in_for_rknnlite(box):
    """``RKNNLite``: load_rknn and init_runtime return codes, inference takes a list of NHWC arrays and returns a list."""

    class RKNNLite:
        def load_rknn(self, path):
            box.loaded.append(path)
            return box.codes.get("load_rknn", 0)

        def init_runtime(self):
            return box.codes.get("init_runtime", 0)

        def inference(self, inputs):
            (array,) = inputs
            output = box.infer(array)
            return None if output is None else [output]

    return {"rknnlite": {}, "rknnlite.api": {"RKNNLite": RKNNLite}}


STAND_INS = {"bpu": stand_in_for_hobot_dnn, "rknn": stand_in_for_rknnlite}
TARGETS = {"bpu": bpu, "rknn": rknn}


@pytest.fixture
def board(monkeypatch):
    """Makes this machine look like a board that has the package of target `name`."""

    def make(name, machine="aarch64", shape=(1, 1, 28, 28)):
        box = StandIn(shape)
        for module, content in STAND_INS[name](box).items():
            made = types.ModuleType(module)
            made.__spec__, made.__path__ = importlib.machinery.ModuleSpec(module, None), []
            made.__dict__.update(content)
            monkeypatch.setitem(sys.modules, module, made)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        return box

    return make


@pytest.mark.parametrize("name", STAND_INS)
def test_a_board_gets_images_one_by_one_in_its_layout(name, board, tmp_path):
    box, artifact = board(name), artifact_of(name, tmp_path)
    target = TARGETS[name]
    assert target.on_board() and target.available().available and "on the board" in target.available().version
    x = images(MODEL, 3).astype(np.float64)
    session = target.open(artifact)
    got = session.run({"pixels": x})["logits"]
    assert got.shape == (3, 10) and got.dtype == np.float32 and np.array_equal(got, np.tile(LOGITS, (3, 1)))
    box.output[:] = 0  # the vendors reuse their buffers
    assert got.any()
    layout = (0, 2, 3, 1) if name == "rknn" else (0, 1, 2, 3)
    wanted = [image[None].transpose(layout).astype(np.float32) for image in x]
    assert len(box.given) == 3 and all(np.array_equal(a, b) for a, b in zip(box.given, wanted, strict=True))
    assert box.loaded == [str(artifact.path)]
    assert [op.name for op in session.ops({})] == ["head.conv", "blocks.0.softmax"]
    assert session.estimate().npu_mac_share == 0.75


def test_an_rk_board_gets_what_its_graph_takes_with_the_first_axis_last(board, tmp_path):
    """The toolkit counts (h, w, in) as channels, rows and columns."""
    box, artifact = board("rknn"), artifact_of("rknn", tmp_path)
    x = images(MODEL, 1)
    rknn.open(replace(artifact, settings={**artifact.settings, "pixels": "NHWC"})).run({"pixels": x})
    rknn.open(artifact).run({"pixels": x})
    taken, usual = box.given
    assert np.array_equal(taken, x.transpose(0, 3, 1, 2)) and np.array_equal(usual, x.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", STAND_INS)
def test_what_a_board_does_wrong_is_a_sentence(name, board, tmp_path):
    box, artifact, x = board(name), artifact_of(name, tmp_path), images(MODEL, 1)
    session = TARGETS[name].open(artifact)

    def refused(match):
        with pytest.raises(TargetUnavailable, match=match) as caught:
            session.run({"pixels": x})
        assert "\n" not in str(caught.value) and FILES[name][0] in str(caught.value)

    box.output = np.zeros((1, 10, 1, 1), np.int32)
    refused(r"must return 10 values of float32, got int32 \(1, 10, 1, 1\)")
    box.output = np.zeros((1, 16, 1, 1), np.float32)  # aligned, not cut to what is valid
    refused(r"got float32 \(1, 16, 1, 1\)")
    box.error = RuntimeError("hbDNNInfer failed")
    refused("must run the model, got RuntimeError: hbDNNInfer failed")


def test_a_model_the_board_does_not_take_is_a_sentence(board, tmp_path):
    box, artifact = board("rknn"), artifact_of("rknn", tmp_path / "rknn")
    box.codes = {"init_runtime": -1}
    with pytest.raises(
        TargetUnavailable, match=r"must load model\.rknn, got RuntimeError: init_runtime returned -1"
    ) as caught:
        rknn.open(artifact)
    assert "librknnrt" in caught.value.hint
    box.codes, box.output = {}, None
    with pytest.raises(TargetUnavailable, match="inference returned nothing"):
        rknn.open(artifact).run({"pixels": images(MODEL, 1)})


def test_a_model_of_another_size_is_refused_before_it_runs(board, tmp_path):
    box = board("bpu", shape=(1, 3, 224, 224))
    with pytest.raises(TargetUnavailable, match=r"must take \(1, 1, 28, 28\), got \(1, 3, 224, 224\)"):
        bpu.open(artifact_of("bpu", tmp_path))
    assert box.given == []


@pytest.mark.parametrize("name", STAND_INS)
def test_without_a_board_the_simulator_is_opened(name, board, tmp_path, monkeypatch):
    """Also where a package of that name is installed on another kind of machine."""
    board(name, machine="x86_64")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing installed"))
    target = TARGETS[name]
    assert not target.on_board() and not target.available().available
    with pytest.raises(TargetUnavailable, match=f"Target '{name}' is not available"):
        target.open(artifact_of(name, tmp_path))


def test_building_on_a_board_says_what_is_missing(board, tmp_path, monkeypatch):
    board("rknn")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing installed"))
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(MODEL, 1),))
    with pytest.raises(TargetUnavailable, match="rknn-toolkit2 is not installed"):
        rknn.build(lower(MODEL, rknn.CAPABILITIES), options)


@pytest.mark.parametrize("name", STAND_INS)
def test_a_bundle_predicts_on_the_board(name, board, tmp_path):
    box, bundle = board(name), bundle_of(name, tmp_path)
    picture = np.full((40, 40, 3), 128, np.uint8)
    probabilities = bundle.predict(picture)
    assert bundle.default_target == name and probabilities.argmax() == 9 and probabilities.sum() == pytest.approx(1)
    assert len(box.given) == 1 and bundle.check(name)["passed"]
    box.output = -box.output
    assert not bundle.check(name)["passed"]


IN_EMULATOR = """
import pickle, platform, sys
sys.path.append(sys.argv[1])  # behind our own packages: only onnxruntime_qnn is found there
platform.machine = lambda: "aarch64"
import numpy as np
from targets import _board, qnn
artifact = pickle.load(open(sys.argv[2], "rb"))
session = qnn.open(artifact)
assert isinstance(session, _board.OnBoard)
np.save(sys.argv[3], session.run({"pixels": np.load(sys.argv[4])})["logits"])
"""


@pytest.mark.skipif(not qnn.available().available, reason=f"{qnn.available().reason}; {qnn.available().fix}")
def test_the_qnn_runner_computes_the_model_on_the_emulator(tmp_path):
    """The code of a device, down to the vendor's library, which on this machine emulates."""
    import pickle

    artifact = qnn.build(
        lower(MODEL, qnn.CAPABILITIES), BuildOptions(tmp_path, "w8a16", calibration=(images(MODEL, 20),))
    )
    x = images(MODEL, 24)[20:]
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "artifact.pkl").write_bytes(pickle.dumps(artifact))
    site = next((_venv.folder(qnn.RECIPE) / "lib").glob("python*/site-packages"))
    files = [str(tmp_path / name) for name in ("artifact.pkl", "y.npy", "x.npy")]
    done = subprocess.run(
        [sys.executable, "-c", IN_EMULATOR, str(site), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "y.npy")
    assert cosine(got, torch_logits(MODEL, x)) > 0.995
    assert np.array_equal(got, qnn.open(artifact).run({"pixels": x})["logits"])  # the other process agrees to the bit


@pytest.mark.skipif(not rknn.available().available, reason=f"{rknn.available().reason}; {rknn.available().fix}")
@pytest.mark.parametrize("rows", [28, 32])
def test_rockchips_runtime_takes_the_layout_of_the_runner(tmp_path, rows):
    """Graphs that take (in, h, w), and (h, w, in)."""
    model = MODEL if rows == 28 else random_model(VitSpec((32, 24), (8, 8), 3, 64, (BlockSpec(2, 32, 32, 64),)))
    x = images(MODEL, 3) if rows == 28 else random_pixels(model.spec, 3)
    artifact = rknn.build(lower(model, rknn.CAPABILITIES), BuildOptions(tmp_path, "w8a8", calibration=(x,)))
    assert artifact.settings["pixels"] == ("NCHW" if rows == 28 else "NHWC")
    assert artifact.inputs[0].shape[1:] == x.shape[1:]
    parts = [str(next(f.resolve() for f in artifact.files if f.name.endswith(end))) for end in rknn.SUFFIXES[1:]]
    script = Path(__file__).with_name("rknn_layouts.py")
    with _venv.Worker(rknn.RECIPE, script, None, rknn.LIMITS) as worker:
        found, _ = worker.call("both", {"parts": parts, "last": rows == 32}, {"x": x})
    logits = torch_logits(model, x)
    assert found == {"same": True, "control": True, "dtype": "float32", "shape": [1, logits.shape[1], 1, 1]}
    estimate = _estimate.read(artifact)
    assert estimate.cpu_ops == () and len(estimate.subgraphs) == 1
    assert cosine(rknn.open(artifact).run({"pixels": x})["logits"], logits) > 0.98
