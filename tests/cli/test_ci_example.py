"""The composite action of examples/ci: its own script, run as the runner would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "examples/ci/action.yml").read_text())
WORKFLOW = yaml.safe_load((ROOT / "examples/ci/workflow.yml").read_text())
REAL = f'exec {sys.executable} -m compressor "$@"'


def run_action(folder: Path, program: str, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the action's step with `program` as the `vitrim` command; what it wrote as outputs."""
    (step,) = ACTION["runs"]["steps"]
    values = {name: str(given.get("default", "")) for name, given in ACTION["inputs"].items()} | inputs
    env = {key: values[re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", text)[1]] for key, text in step["env"].items()}
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "vitrim").write_text(f"#!/bin/sh\n{program}\n")
    (bin_folder / "vitrim").chmod(0o755)
    env |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "GITHUB_ACTIONS": "true",
    }
    script = folder / "step.sh"
    script.write_text(step["run"])
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],  # as GitHub runs `shell: bash`
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    written = (folder / "output").read_text() if (folder / "output").exists() else ""
    return done, dict(line.split("=", 1) for line in written.splitlines())


def test_the_action_gates_real_bundles(made, tmp_path):
    _, bundle = made
    options = "--confidence=0.9\n\n--target=ort\n--min-int8-share=100%"
    inputs = {"candidate": str(bundle), "baseline": str(bundle), "max-regression": "60%", "options": options}
    done, outputs = run_action(tmp_path, REAL, **inputs)
    assert done.returncode == 1, done.stderr  # not slower, but not all of it runs in integers
    assert outputs == {"verdict": "fail"}
    found = json.loads((tmp_path / "gate.json").read_text())
    assert found["latency"] == "pass"
    assert [finding["rule"] for finding in found["findings"]] == ["int8"]
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "1"
    assert "vitrim gate: regression" in (tmp_path / "summary").read_text()
    assert "::error title=vitrim gate (int8)::Only" in done.stderr


@pytest.mark.parametrize(
    ("code", "strict", "verdict", "exit_code"),
    [(0, "false", "pass", 0), (1, "false", "fail", 1), (3, "false", "inconclusive", 0), (3, "true", "inconclusive", 3)],
)
def test_the_action_maps_every_exit_code(tmp_path, code, strict, verdict, exit_code):
    inputs = {"candidate": "a", "baseline": "b", "fail-on-inconclusive": strict}
    done, outputs = run_action(tmp_path, f"exit {code}", **inputs)
    assert (done.returncode, outputs) == (exit_code, {"verdict": verdict})


def test_the_action_shows_a_usage_error_and_claims_no_verdict(tmp_path):
    done, outputs = run_action(tmp_path, 'echo "{\\"error\\": 1}"; exit 2', candidate="a", baseline="b")
    assert (done.returncode, outputs) == (2, {})
    assert '"error"' in done.stdout


def test_what_is_passed_to_the_action_is_never_run(tmp_path):
    evil = "$(touch pwned) `touch pwned`; touch pwned"
    done, _ = run_action(tmp_path, 'printf "%s\\n" "$@" > arguments', candidate=evil, baseline=evil, options=evil)
    assert done.returncode == 0
    assert not (tmp_path / "pwned").exists()
    assert (tmp_path / "arguments").read_text().splitlines().count(evil) == 3


def test_the_workflow_uses_the_action_as_it_is():
    steps = WORKFLOW["jobs"]["gate"]["steps"]
    (step,) = [s for s in steps if s.get("id") == "gate"]
    assert step["with"].keys() <= ACTION["inputs"].keys()
    assert {name for name, given in ACTION["inputs"].items() if given.get("required")} <= step["with"].keys()
