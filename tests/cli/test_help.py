"""Help where people type it first, and numbers that no machine should be asked for."""

import json

import pytest


@pytest.mark.parametrize("arguments", [("-h",), ("--help",), ("device", "-h"), ("device", "add", "-h"), ("gate", "-h")])
def test_both_spellings_help_everywhere_with_examples(run, arguments):
    code, stdout, stderr = run(*arguments)
    assert (code, stderr) == (0, "") and stdout.lstrip().startswith("Usage: vitrim") and "  vitrim " in stdout


@pytest.mark.parametrize("arguments", [(), ("device",)])
def test_nothing_asked_is_answered_with_help_and_not_called_an_error(run, arguments):
    """Control: an unknown command is one."""
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "") and stderr.lstrip().startswith("Usage: vitrim") and "vitrim: " not in stderr
    code, _, stderr = run(*arguments, "no-such-command")
    assert code == 2 and "vitrim: No such command" in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "b", "--threads", 999),
        ("profile", "b", "--streams", 999_999),
        ("run", "b", "x.png", "--threads", 999),
        ("gate", "b", "--baseline", "b", "--threads", 999),
        ("search", "demo", "--threads", 999),
        ("compress", "demo", "--threads", 999, "--out", "b"),
    ],
)
def test_more_threads_than_any_machine_runs_are_refused(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = run(*arguments, "--json")
    error = json.loads(stdout)["error"]
    assert code == 2 and "256" in error["message"] and not list(tmp_path.iterdir())


def test_what_is_no_bundle_is_bad_input_and_not_a_failed_verification(run, tmp_path):
    """Control: tests/cli/test_main_job.py has bundles whose hashes do not match, which is exit code 1."""
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    for path in (tmp_path, tmp_path / "photo.png", tmp_path / "none"):
        code, stdout, _ = run("verify", path, "--json")
        assert code == 2 and json.loads(stdout)["error"]["code"] == "BundleError"
    (tmp_path / "manifest.json").write_text("{}")
    code, stdout, _ = run("verify", tmp_path, "--json")
    assert code == 1 and json.loads(stdout)["error"]["code"] == "BundleError"
