"""The race on a device, run in a folder here: what was packed is what races, and another network is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from compressor import replies
from compressor.candidates import build
from compressor.errors import BundleError, ParityError, TargetUnavailable
from compressor.profile import ProfileConfig
from compressor.race import packed, race_here, race_there
from compressor.types import BuildOptions
from targets import ort
from tests.targets.networks import PLAIN, grids, model, pixels, pruned

CONFIG = {"runs": 10, "min_runs": 10, "warmup": 0, "threads": 1}


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """Arguments of a race whose files were sent into the current folder."""
    network = model(pruned(PLAIN))
    artifacts = {
        "reference": build(model(PLAIN), "ort", BuildOptions(tmp_path / "a", "fp32", "m")),
        "w8a8": build(network, "ort", BuildOptions(tmp_path / "b", "w8a8", "m"), grids(network)),
    }
    inputs = {artifacts["w8a8"].inputs[0].name: pixels(PLAIN, 1)}
    sessions = {name: ort.open(a) for name, a in artifacts.items()}
    expected = {name: s.run(inputs)[artifacts[name].outputs[0].name] for name, s in sessions.items()}
    files, entries = packed(artifacts, expected, inputs, tmp_path)
    there = tmp_path / "there"
    for name, file in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(Path(file).read_bytes())
    monkeypatch.chdir(there)
    here = race_here(artifacts, sessions, inputs, ProfileConfig(**CONFIG))
    return json.loads(json.dumps({"target": "ort", "artifacts": entries, "config": CONFIG})), here


def test_a_race_there_answers_as_one_here(sent):
    arguments, here = sent
    there = replies.raced(json.loads(json.dumps(race_there(arguments))), here.samples_ns)
    assert {n: len(t) for n, t in there.samples_ns.items()} == {"reference": 10, "w8a8": 10}
    for name in here.samples_ns:
        assert [(op.name, op.precision) for op in there.ops(name)] == [(op.name, op.precision) for op in here.ops(name)]
    assert there.device["id"] == here.device["id"]


def test_an_artifact_that_computes_something_else_there_is_refused(sent):
    tensors = dict(np.load("race/tensors.npz"))
    np.savez("race/tensors.npz", **{**tensors, "expected.1": -tensors["expected.1"]})
    with pytest.raises(ParityError, match="w8a8: outputs there must be within"):
        race_there(sent[0])


def test_an_artifact_outside_the_folder_is_refused(sent):
    arguments, _ = sent
    arguments["artifacts"]["w8a8"]["files"] = ["../a/m.onnx"]
    with pytest.raises(BundleError, match="must stay inside"):
        race_there(arguments)


@pytest.mark.parametrize("change", [{"w8a8": [1] * 9}, {"w8a8": [0] * 10}, {"other": [1] * 10}])
def test_an_answer_without_a_sample_for_every_sample_is_refused(sent, change):
    arguments, here = sent
    answer = race_there(arguments)
    answer["samples_ns"] |= change
    with pytest.raises(TargetUnavailable, match="answer is not valid"):
        replies.raced(answer, here.samples_ns)
