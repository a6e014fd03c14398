"""What `vitrim verify` and `vitrim report` answer, on a bundle of a tiny network."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor import checkpoint
from compressor.candidates import build
from compressor.errors import ConfigError
from compressor.inference import Source, evaluate_source, verify_bundle, write_report
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


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images without labels."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * i, np.uint8)).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


def test_a_target_without_float_is_evaluated_against_the_float_model_elsewhere(bundle, photos, monkeypatch):
    from compressor import candidates

    built, real = [], candidates.open_model
    monkeypatch.setattr(candidates, "open_model", lambda m, name, *rest: (built.append(name), real(m, name, *rest))[1])
    for _ in range(2):
        found = evaluate_source(Source(str(bundle), "null"), str(photos), None, lambda *_: None)
        assert (found["target"], found["n"], found["agreement"], found["flips"]) == ("null", 3, 100.0, 0)
        # from here on as an NPU's target is
        monkeypatch.setattr(null, "CAPABILITIES", replace(null.CAPABILITIES, precisions=("w8a8",)))
    assert built == ["null", "ort"]
    with pytest.raises(ConfigError, match="must be one of w8a8"):  # the control: it does refuse float
        evaluate_source(Source("demo", "null"), str(photos), None, lambda *_: None)


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
