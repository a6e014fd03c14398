"""`vitrim search` from the command line, on the embedded model."""

import json

from tests.cli.conftest import vitrim


def test_search_bundles_the_best_size_inside_the_budget(tmp_path, cache):
    out = tmp_path / "b"
    arguments = (
        "--sizes",
        "1,0.5",
        "--calib-size",
        40,
        "--precision",
        "fp32",
        "--max-drop",
        30,
        "--out",
        out,
        "--json",
    )
    done = vitrim("search", "demo", *arguments, env=cache)
    assert done.code == 0, done.err
    found = done.json["search"]
    assert [p["target_macs"] for p in found["points"]] == [1.0, 0.5]
    assert all(p["n"] == 8 for p in found["points"])  # every fifth of 40 judges
    picked = found["picked"]["target_macs"]
    share = done.json["compressed"]["macs"] / done.json["reference"]["macs"]
    assert abs(share - picked) < 0.02
    assert json.loads((out / "report.json").read_text())["search"]["picked"] == found["picked"]
    assert vitrim("verify", out).code == 0


def test_an_impossible_budget_exits_1_and_leaves_nothing(tmp_path, cache):
    out = tmp_path / "b"
    arguments = ("--sizes", "0.5", "--calib-size", 40, "--precision", "fp32", "--max-latency", "0.001ms", "--out", out)
    done = vitrim("search", "demo", *arguments, "--json", env=cache)
    assert done.code == 1 and done.json["error"]["code"] == "BudgetError"
    assert "0.001 ms" in done.json["error"]["message"] and not out.exists()
