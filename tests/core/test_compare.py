"""Bundles side by side: what each holds, nothing more, and a warning where numbers do not compare."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor import checkpoint, show
from compressor.candidates import build
from compressor.compare import compare, rows
from compressor.errors import BundleError, ConfigError
from compressor.manifest import artifact_entry, seal
from compressor.types import BuildOptions
from tests.targets.networks import PLAIN, model, pruned


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny network without a report."""
    folder, network = tmp_path_factory.mktemp("bare") / "b", model(pruned(PLAIN))
    folder.mkdir()
    checkpoint.save(network, folder)
    artifact = build(network, "null", BuildOptions(folder / "targets/null", "fp32", "fp32"))
    np.savez(folder / "golden.npz", inputs=np.zeros((8, 3, 32, 32), np.float32))
    content: dict[str, Any] = {key: {} for key in ("recipe", "versions", "calibration")}
    content |= {"spec": asdict(network.spec), "preprocess": asdict(network.preprocess), "labels": [], "seed": 0}
    entry = {"null": artifact_entry(artifact, folder).model_dump()}
    seal(folder, {**content, "checkpoint": {"name": "tiny"}, "targets": entry})
    return folder


def report(**changes: Any) -> dict[str, Any]:
    accuracy = {"n": 100, "top1": 91.0, "top1_ci95": [83.8, 95.2], "agreement": 99.0}
    target = {"name": "null", "latency_ms": {"p50": 2.0, "p90": 2.5, "p99": 3.0}, "accuracy": accuracy}
    device = {"id": "0123456789ab", "cpu": {"model": "A"}}
    base = {"model": "tiny", "compressed": {"evaluated_on": "evaluation"}, "targets": [target]}
    return {**base, "provenance": {"device": device}, **changes}


def with_report(bare: Path, to: Path, content: Any, name: str = "report.json") -> Path:
    shutil.copytree(bare, to)
    (to / name).write_text(json.dumps(content))
    manifest = json.loads((to / "manifest.json").read_text())
    seal(to, {key: value for key, value in manifest.items() if key not in ("schema", "files")})
    return to


def test_values_are_those_of_the_bundles(bare: Path, tmp_path: Path) -> None:
    network = model(pruned(PLAIN))
    found = compare([with_report(bare, tmp_path / "a", report()), bare])
    first, second = found["bundles"]
    assert first["params"] == second["params"] == sum(w.size for w in network.weights.values())
    assert first["macs"] == network.spec.macs()
    (target,) = first["targets"]
    assert target["size_bytes"] == sum(f.stat().st_size for f in (bare / "targets/null").iterdir())
    assert target["latency_ms"]["p50"] == 2.0 and target["top1"] == 91.0 and target["device"]["cpu"] == "A"
    (unknown,) = second["targets"]  # no report: nothing is made up
    assert unknown["precision"] == "fp32" and unknown["latency_ms"] is None and unknown["top1"] is None
    assert found["warnings"] == []
    json.dumps(found, allow_nan=False)


def test_an_engine_built_on_a_device_counts_as_measured_there(bare: Path, tmp_path: Path) -> None:
    built = {"latency_ms": {"p50": 0.5, "p90": 0.6, "p99": 0.7}, "device": {"id": "f" * 12, "cpu": {"model": "B"}}}
    found = compare([bare, with_report(bare, tmp_path / "a", built, "targets/null/build.json")])
    (target,) = found["bundles"][1]["targets"]
    assert target["latency_ms"]["p50"] == 0.5 and target["device"] == {"id": "f" * 12, "cpu": "B"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        (
            {"provenance": {"device": {"id": "f" * 12, "cpu": {"model": "B"}}}},
            "null: latencies were measured on different",
        ),
        ({"compressed": {"evaluated_on": "calibration"}}, "Accuracies are of different images"),
        ({"model": "large"}, "different models: tiny, large"),
        (
            {"targets": [], "compiled": [{"name": "null", "latency_ms": 1.0}]},
            "null: some latencies are a compiler's estimate",
        ),
    ],
)
def test_what_does_not_compare_is_said(bare: Path, tmp_path: Path, change: dict[str, Any], says: str | None) -> None:
    pair = [
        with_report(bare, tmp_path / "a", report()),
        with_report(bare, tmp_path / "b", report(**change)),
    ]
    warnings = compare(pair)["warnings"]
    assert warnings == [] if says is None else [w for w in warnings if says in w]


def test_rows_have_a_cell_for_every_bundle(bare: Path, tmp_path: Path) -> None:
    pair = [with_report(bare, tmp_path / "a", report()), bare]
    lines = dict(rows(compare(pair)["bundles"]))
    assert lines["null p50 ms"] == ["2", ""] and lines["null top-1"] == ["91.00 % (83.8 to 95.2)", ""]
    assert all(len(cells) == 2 for cells in lines.values())


def test_names_are_shown_and_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    names = ["[/b]", "[red]c", "[/x]", "[bold]y"]
    for line in show.compared(names[:2], [("model", names[2:])], []):
        Console(width=100).print(line)
    printed = capsys.readouterr().out
    assert [name for name in names if name not in printed] == []


@pytest.mark.parametrize("content", [[], {"targets": [{}]}, {"targets": 3}, report(provenance={"device": {"cpu": 1}})])
def test_a_report_of_another_shape_is_one_sentence(bare: Path, tmp_path: Path, content: Any) -> None:
    with pytest.raises(BundleError, match=r"report\.json"):
        compare([bare, with_report(bare, tmp_path / "a", content)])


def test_one_bundle_is_refused(bare: Path) -> None:
    with pytest.raises(ConfigError, match="at least two bundles must be given, got 1"):
        compare([bare])
