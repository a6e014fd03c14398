"""Rules and outputs of a gate: what machines parse, and that nothing from a bundle can break out of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compressor.errors import ConfigError, DataError
from compressor.gate import GateConfig, GateVerdict, conclude
from compressor.gate.output import GateResult, github, junit, markdown, to_json
from compressor.gate.rules import Facts, Finding, Images, RuleConfig, check, facts_of
from compressor.gating import GateOptions, check_outputs, run_gate
from compressor.types import OpRecord

SLOW = conclude([[1.12] * 8, [1.12] * 8], GateConfig())
FINE = conclude([[1.0] * 9], GateConfig())
NASTY = Finding("fallback", "fail", "node <b>`x`</b> | y\x07\n::error::stop 5 %")


def op(
    name: str, placement: str = "CPU", precision: str = "fp32", time_ms: float = 1.0, kind: str = "MatMul"
) -> OpRecord:
    return OpRecord(name, kind, placement, precision, time_ms)


def result(latency: GateVerdict = FINE, *findings: Finding) -> GateResult:
    device = {"id": "abc123", "cpu": {"model": "Test | CPU"}}
    return GateResult(latency, device, findings, {"candidate": 5.6, "baseline": 5.0}, [[1.0] * 9], 12.5)


SEEN = Images("evaluation", 2000)
BASE = Facts(
    1000,
    top1=91.0,
    top1_ci=(90.0, 92.0),
    agreement=99.0,
    images=SEEN,
    peak_rss_bytes=100,
    ops=(op("a"), op("b", precision="int8")),
)


@pytest.mark.parametrize(
    ("candidate", "config", "rule", "text"),
    [
        (
            Facts(1000, top1=89.9, images=SEEN),
            RuleConfig(max_drop=1.0),
            "accuracy",
            "Top-1 fell by 1.10 points, from 91.00 to 89.90; 1 are allowed",
        ),
        (
            Facts(1000, agreement=97.5, images=SEEN),
            RuleConfig(max_drop=1.0),
            "accuracy",
            "Agreement with the original fell by 1.50 points",
        ),
        (
            Facts(1101),
            RuleConfig(max_size_growth=0.1),
            "size",
            "artifact grew by 10.1 %, from 1000 to 1101 bytes; 10 % are allowed",
        ),
        (Facts(1, peak_rss_bytes=121), RuleConfig(max_memory_growth=0.2), "memory", "peak memory grew by 21.0 %"),
        (
            Facts(1, ops=(op("a", precision="int8"), op("b", time_ms=1.5))),
            RuleConfig(min_int8_share=0.5),
            "int8",
            "Only 40.0 % of the node time",
        ),
        (
            Facts(1, ops=(op("a", "NPU"), op("b"), op("c", kind="Const"))),
            RuleConfig(forbid_fallback=True),
            "fallback",
            r"1 of 2 nodes fell back from NPU to the CPU: b \(MatMul\)",
        ),
    ],
)
def test_rule_is_broken_just_beyond_its_limit(candidate: Facts, config: RuleConfig, rule: str, text: str) -> None:
    (finding,) = check(BASE, candidate, config)
    assert (finding.rule, finding.verdict) == (rule, "fail")
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(finding.sentence)
    assert check(BASE, BASE, config) == ()  # Negative control: the same bundle breaks no rule
    assert check(BASE, candidate, RuleConfig()) == ()  # nor does anything when no rule is switched on


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (RuleConfig(max_drop=1.0), "accuracy"),
        (RuleConfig(max_memory_growth=0.1), "memory"),
        (RuleConfig(min_int8_share=0.1), "int8"),
        (RuleConfig(forbid_fallback=True), "fallback"),
    ],
)
def test_rule_that_cannot_be_checked_is_inconclusive_and_not_passed(config: RuleConfig, rule: str) -> None:
    (finding,) = check(BASE, Facts(10), config)
    assert (finding.rule, finding.verdict) == (rule, "inconclusive")


def test_a_target_that_has_only_the_cpu_has_no_fallback() -> None:
    assert check(BASE, Facts(1, ops=(op("a"), op("b"))), RuleConfig(forbid_fallback=True)) == ()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            Images("evaluation", 50),
            "the baseline's is of 2000 evaluation images, the candidate's of 50 evaluation images",
        ),
        (Images("calibration", 2000), "the candidate's of 2000 calibration images"),
        (Images("evaluation", 2000, "b"), "the candidate's of others"),
    ],
)
def test_accuracies_of_different_images_do_not_compare(images: Images, said: str) -> None:
    baseline = replace(BASE, images=Images("evaluation", 2000, "a"))
    better, drop = replace(BASE, top1=99.0, images=images), RuleConfig(max_drop=0.5)
    (finding,) = check(baseline, better, drop)
    assert (finding.rule, finding.verdict) == ("accuracy", "inconclusive")
    assert said in finding.sentence
    for same in (
        Images("evaluation", 2000, "a"),
        Images("evaluation", 2000),
    ):  # a digest that is not known denies nothing
        assert check(baseline, replace(better, images=same), drop) == ()


def test_facts_are_read_from_a_report() -> None:
    accuracy = {"top1": 90.0, "top1_ci95": [89, 91], "agreement": 99.5, "n": 50}
    entry = {"name": "ort", "accuracy": accuracy}
    report = {"targets": [entry], "compressed": {"evaluated_on": "evaluation"}, "ops": {"ort": [vars(op("a"))]}}
    seen = Images("evaluation", 50)
    assert facts_of(report, "ort", 5) == Facts(5, 90.0, (89.0, 91.0), 99.5, seen, None, (op("a"),))
    agreed = {
        **report,
        "targets": [{"name": "ort"}],
        "compressed": {"agreement": 99.0, "n": 64} | {"evaluated_on": "calibration"},
    }
    agreed["provenance"] = {"calibration": {"sha256": "a"}}
    assert facts_of(agreed, "ort", 5).images == Images("calibration", 64, "a")
    with pytest.raises(DataError, match="must be what `vitrim compress` writes"):
        facts_of({"targets": [{"name": "ort"}], "compressed": {}}, "ort", 5)


def test_of_an_engine_that_was_built_later_only_the_size_is_known() -> None:
    found = facts_of({"targets": [], "plans": [{"name": "tensorrt", "size_bytes": 1}]}, "tensorrt", 7)
    assert found == Facts(7)
    (finding,) = check(found, found, RuleConfig(max_drop=1.0, max_size_growth=0.1))
    assert finding.verdict == "inconclusive"
    assert "engines that `vitrim build` made have none" in finding.sentence


@pytest.mark.parametrize("change", [{"max_drop": -1.0}, {"max_size_growth": math.nan}, {"min_int8_share": 1.5}])
def test_rule_config_refuses_what_cannot_work(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        RuleConfig(**change)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("latency", "findings", "verdict"),
    [
        (FINE, (), "pass"),
        (SLOW, (), "fail"),
        (FINE, (NASTY,), "fail"),
        (FINE, (Finding("int8", "inconclusive", "?"),), "inconclusive"),
        (SLOW, (Finding("int8", "inconclusive", "?"),), "fail"),
    ],
)
def test_overall_is_the_worst_of_all(latency: GateVerdict, findings: tuple[Finding, ...], verdict: str) -> None:
    assert result(latency, *findings).overall.verdict == verdict


def test_json_has_the_contracts_keys_and_no_infinity() -> None:
    unsure = conclude([[1.0] * 3], GateConfig())
    data = json.loads(json.dumps(to_json(result(unsure, NASTY)), allow_nan=False))
    assert {"verdict", "sentence", "ratio", "ratio_ci", "limit", "min_detectable", "pairs", "device"} <= data.keys()
    assert data["ratio_ci"] == [None, None]
    assert data["min_detectable"] is None
    assert to_json(result())["ratio_ci"][1] <= 1.05


def test_junit_counts_failures_and_errors_apart() -> None:
    suite = ElementTree.fromstring(junit(result(SLOW, NASTY, Finding("int8", "inconclusive", "?")), 'b"<&>'))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "1")
    assert suite.get("name") == 'vitrim gate b"<&>'
    failure = suite.find("testcase[@name='latency']/failure")
    assert failure is not None
    assert failure.get("message") == SLOW.sentence
    fine = ElementTree.fromstring(junit(result(), "b"))
    assert (fine.get("failures"), fine.get("errors")) == ("0", "0")


@pytest.mark.parametrize(
    ("option", "path", "says"),
    [
        ("junit", "nowhere/gate.xml", "--junit must be a file in a folder that exists"),
        ("markdown", ".", "--markdown must be a file"),
        ("history", "file", "--history must be a folder"),
        ("history", "file/deeper", "--history must be a folder"),
        ("history", "damaged", "line 1 must be a JSON object"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    option: str, path: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/history.jsonl").write_text("{\n")
    places: dict[str, Path | None] = {
        "junit": tmp_path / "gate.xml",
        "markdown": None,
        "history": tmp_path / "a/b",
    }
    check_outputs(**places)
    with pytest.raises((ConfigError, DataError), match=says):
        check_outputs(**places | {option: tmp_path / path})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "file"]


def test_markdown_cannot_be_broken_out_of() -> None:
    text = markdown(result(SLOW, NASTY), "new|bundle", "<img src=x>")
    assert "vitrim gate: regression" in text
    assert "1.120" in text
    table = [line for line in text.splitlines() if line.startswith("| bundle")]
    assert table == [r"| bundle | new\|bundle | \<img src=x\> |"]
    assert "<b>" not in text
    assert sum(line.startswith("- ") for line in text.splitlines()) == 1


def test_github_annotations_are_one_line_each_at_the_right_level() -> None:
    lines = github(result(SLOW, NASTY))
    assert len(lines) == 2
    assert all("\n" not in line for line in lines)
    assert lines[0].startswith("::error title=vitrim gate (latency)::Slower")
    assert lines[1].endswith("%0A::error::stop 5 %25")
    assert github(result())[0].startswith("::notice ")


def test_rules_that_a_stored_profile_cannot_answer_are_refused_and_not_passed_over(tmp_path: Path) -> None:
    options = GateOptions(rules=RuleConfig(max_drop=0.5))
    with pytest.raises(ConfigError, match="must be given with --baseline"):
        run_gate(tmp_path / "b", None, tmp_path / "profile.json", options)
    with pytest.raises(DataError, match="readable JSON"):  # the control: without rules it goes on to read the profile
        run_gate(tmp_path / "b", None, tmp_path / "profile.json", GateOptions())
