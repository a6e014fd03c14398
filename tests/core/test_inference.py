"""What `vitrim verify` and `vitrim report` answer, on a bundle of a tiny network."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from compressor import checkpoint
from compressor.candidates import build
from compressor.inference import verify_bundle, write_report
from compressor.manifest import artifact_entry, seal
from compressor.output import zip_folder
from compressor.types import BuildOptions
from targets import null
from tests.core.pages import report
from tests.targets.networks import PLAIN, model, pixels


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A sealed bundle for the null target."""
    folder, network = tmp_path / "b", model(PLAIN)
    folder.mkdir()
    checkpoint.save(network, folder)
    artifact = build(network, "null", BuildOptions(folder / "targets/null", "fp32", "fp32"))
    images = pixels(PLAIN, 2)
    logits = null.open(artifact).run({artifact.inputs[0].name: images})[artifact.outputs[0].name]
    np.savez(folder / "golden.npz", inputs=images, reference=logits, **{"outputs.null": logits})
    content: dict[str, object] = {key: {} for key in ("recipe", "versions", "calibration", "checkpoint")}
    content |= {"spec": asdict(network.spec), "preprocess": asdict(network.preprocess), "labels": [], "seed": 0}
    seal(folder, {**content, "targets": {"null": artifact_entry(artifact, folder).model_dump()}})
    return folder


def renamed(folder: Path, *names: str) -> Path:
    """The bundle with its artifact under each of `names`."""
    content = json.loads((folder / "manifest.json").read_text())
    (entry,) = content["targets"].values()
    kept = {key: value for key, value in content.items() if key not in ("schema", "files")}
    seal(folder, kept | {"targets": dict.fromkeys(names, entry)})
    return folder


def test_a_target_that_is_not_installed_is_skipped_and_the_others_are_checked(bundle):
    done = verify_bundle(renamed(bundle, "third-party", "null"), None)
    assert done.exit_code == 0 and done.data["passed"]
    assert [(c["target"], c["passed"]) for c in done.data["targets"]] == [("third-party", None), ("null", True)]
    assert "not run: no target of this name is installed here" in "\n".join(done.lines)


def test_what_could_not_be_checked_at_all_has_not_passed(bundle):
    done = verify_bundle(renamed(bundle, "third-party"), None)
    assert done.exit_code == 3 and not done.data["passed"]


def test_a_failure_beside_a_skipped_target_is_seen(bundle):
    with np.load(bundle / "golden.npz") as stored:
        np.savez(bundle / "golden.npz", **{**stored, "outputs.null": -stored["outputs.null"] - 1})
    assert verify_bundle(renamed(bundle, "third-party", "null"), None).exit_code == 1


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up")  # a zipped bundle is unpacked until it is collected
def test_reports_of_versions_do_not_replace_each_other(bundle, tmp_path):
    (bundle / "report.json").write_text(json.dumps(report()))
    renamed(bundle, "null")
    zip_folder(bundle, tmp_path / "z.v1.zip")
    written = [write_report(bundle.rename(tmp_path / "b.v1"), None), write_report(tmp_path / "z.v1.zip", None)]
    assert [path.name for path in written] == ["b.v1.html", "z.v1.html"]
    assert "<html" in written[0].read_text()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_fails_in_words_that_json_can_hold(bundle, monkeypatch, value):
    assert verify_bundle(bundle, None).exit_code == 0  # the control
    run = null.NullSession.run
    monkeypatch.setattr(
        null.NullSession, "run", lambda self, inputs: {n: v * value for n, v in run(self, inputs).items()}
    )
    found = verify_bundle(bundle, None)
    assert found.exit_code == 1 and json.loads(json.dumps(found.data, allow_nan=False))["targets"][0]["max_abs"] is None
    assert "not finite" in found.lines[1]
