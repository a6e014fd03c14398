"""What `vitrim gate` makes of its options, before it looks at a bundle."""

from __future__ import annotations

import json

import pytest

from compressor.errors import ConfigError


@pytest.fixture
def gate(run, tmp_path):
    """`vitrim gate --json` in this process, of bundles that do not exist: (exit code, the error)."""

    def call(*arguments):
        code, answer, _ = run("gate", tmp_path / "new", "--baseline", tmp_path / "old", *arguments, "--json")
        return code, json.loads(answer)["error"]

    return call


@pytest.mark.parametrize("option", ["--max-regression", "--max-size-growth", "--max-memory-growth"])
@pytest.mark.parametrize("text", ["5", "1", "1.0", "inf", "1e3"])
def test_a_share_of_one_or_more_is_refused_without_a_percent_sign(gate, option, text):
    code, error = gate(option, text)
    assert (code, error["code"]) == (2, "ConfigError")
    assert (
        f"{option} must be a percentage such as 5%, or a share below 1 such as 0.05, got {text!r}" in error["message"]
    )
    for plain in ("5%", "0.05", "100%"):  # the control: the bundles are looked at, and are not there
        assert gate(option, plain)[1]["code"] == "BundleError"


def test_a_limit_that_is_not_finite_is_refused(gate):
    code, error = gate("--max-regression", "inf%")
    assert (code, error["code"]) == (2, "ConfigError") and "finite and above -1, got inf" in error["message"]


def test_every_run_draws_its_own_coins_and_has_the_budget_asked_for(gate, monkeypatch):
    seen = []

    def spy(candidate, baseline, stored, options, progress):
        seen.append(options)
        raise ConfigError("enough seen")

    monkeypatch.setattr("compressor.gating.run_gate", spy)
    assert gate("--budget", "600")[1]["message"] == gate()[1]["message"] == "enough seen"
    assert [options.duel.budget_s for options in seen] == [600.0, 240.0]
    assert seen[0].gate.seed != seen[1].gate.seed
