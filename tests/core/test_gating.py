"""What a gate needs is looked at before it measures: a worker of these bundles, whose network is none, would say so."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from compressor.device import fingerprint
from compressor.errors import BundleError, ConfigError, DataError, VitrimError
from compressor.gate.rules import RuleConfig
from compressor.gating import GateOptions, gate_bundles, gate_stored, publish
from compressor.manifest import TargetEntry, seal
from compressor.profile_json import to_json
from compressor.types import Profile
from tests.core.test_gate_output import SLOW, result
from tests.targets.networks import PLAIN, model, pruned

DROP = GateOptions(rules=RuleConfig(max_drop=0.5))
UNOPENED = "must have sha256"  # the artifact, once it is opened to be measured


def bundle(folder: Path, report: str | None = None) -> Path:
    """A sealed bundle whose artifact is refused when it is opened."""
    network = model(pruned(PLAIN))
    (folder / "targets/ort").mkdir(parents=True)
    (folder / "targets/ort/fp32.onnx").write_bytes(b"no network")
    np.savez(
        folder / "golden.npz", inputs=np.zeros((1, 3, 32, 32), np.float32), reference=np.zeros((1, 10), np.float32)
    )
    if report is not None:
        (folder / "report.json").write_text(report)
    file = "targets/ort/fp32.onnx"
    tensor = {"name": "pixels", "dtype": "float32", "shape": [-1, 3, 32, 32]}
    entry = TargetEntry(
        path=file,
        files=[file],
        sha256="0" * 64,
        precision="fp32",
        inputs=[tensor],
        outputs=[tensor],  # type: ignore[list-item]
    )
    content: dict[str, object] = {key: {} for key in ("versions", "calibration", "checkpoint", "recipe")}
    content |= {"spec": asdict(network.spec), "preprocess": asdict(network.preprocess), "labels": [], "seed": 0}
    seal(folder, {**content, "targets": {"ort": entry.model_dump()}})
    return folder


def stored(path: Path, **changes: object) -> Path:
    profile = Profile("ort", (5_000_000,) * 20, 5, 1, 1, 0.0, 0.0, 0, fingerprint(), yardstick_ns=(20_000,) * 9)
    path.write_text(json.dumps({**to_json(profile), **changes}))
    return path


@pytest.mark.parametrize(
    ("report", "error", "says"),
    [
        (None, BundleError, "must hold report.json for these rules"),
        ("{", DataError, "must be JSON"),
        ("[]", DataError, "must be what `vitrim compress` writes"),
    ],
)
def test_rules_without_a_report_are_refused_before_anything_is_measured(
    tmp_path: Path, report: str | None, error: type[VitrimError], says: str
) -> None:
    one = bundle(tmp_path / "b", report)
    with pytest.raises(error, match=says):
        gate_bundles(one, one, DROP)
    with pytest.raises(VitrimError, match=UNOPENED) as control:  # without rules it goes on, to opening the artifact
        gate_bundles(one, one, GateOptions())
    assert says not in str(control.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threads": 2}, "threads must be that of the stored profile, 2, got 1"),
        ({"batch": 8}, "batch must be that of the stored profile, 8, got 1"),
        ({"device": {"id": "other"}}, "must be of this device"),
    ],
)
def test_a_stored_profile_of_something_else_is_refused_before_anything_is_measured(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    one = bundle(tmp_path / "b")
    with pytest.raises(ConfigError, match=says):
        gate_stored(one, stored(tmp_path / "p.json", **change), GateOptions())
    with pytest.raises(VitrimError, match=UNOPENED) as control:
        gate_stored(one, stored(tmp_path / "p.json"), GateOptions())
    assert "stored profile" not in str(control.value)


@pytest.mark.parametrize("change", [{"samples_ns": [1e999]}, {"batch": 1e999}, {"yardstick_ns": [1e999]}])
def test_a_stored_profile_with_infinite_numbers_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="Stored profile must be"):
        gate_stored(tmp_path, stored(tmp_path / "p.json", **change), GateOptions())


def test_published_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of the text leaves the old file as it was."""
    page, written = tmp_path / "gate.md", Path.write_text
    page.write_text("of the last run")

    def fills_up(path: Path, text: str, **rest: str) -> int:
        written(path, text[:10], **rest)  # type: ignore[arg-type]
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fills_up)
    with pytest.raises(OSError, match="No space left"):
        publish(result(SLOW), tmp_path, tmp_path, junit=None, markdown=page, history=None)
    assert page.read_text() == "of the last run"
    assert [p.name for p in tmp_path.iterdir()] == ["gate.md"]
