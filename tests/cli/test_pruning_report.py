"""What `compress` writes down about every block that it made smaller."""

import json
import math

from tests.cli.conftest import vitrim


def test_every_block_reports_sizes_errors_damping_and_fallbacks(tmp_path, cache):
    out = tmp_path / "b"
    done = vitrim(
        *("compress", "demo", "--mlp-ratio", 0.5, "--qk-ratio", 0.5, "--vo-ratio", 0.5, "--drop-blocks", 1),
        *("--importance", "entropy", "--damping", "auto"),
        *("--calib-size", 1, "--precision", "fp32", "--out", out, "--json"),
        env=cache,
    )
    assert done.code == 0, done.err
    assert done.json["targets"][0]["pruning"].keys() == {"ratio", "ci95", "faster", "sentence"}
    rows = json.loads((out / "report.json").read_text())["blocks"]
    spec = json.loads((out / "manifest.json").read_text())["spec"]["blocks"]
    gone = [r["block"] for r in rows if r["part"] == "block"]
    alive = [i for i in range(len(spec) + 1) if i not in gone]
    assert len(gone) == 1 and len(alive) == len(spec)
    for row in rows:
        assert row.keys() == {"block", "part", "before", "after", "predicted", "measured", "damping", "fallback"}
        assert row["after"] < row["before"] and math.isfinite(row["predicted"]) and row["predicted"] >= 0
    widths = {"mlp": "mlp_dim", "qk": "qk_dim", "vo": "v_dim"}
    for place, index in enumerate(alive):
        parts = {r["part"]: r for r in rows if r["block"] == index}
        assert {p: r["after"] for p, r in parts.items()} == {p: spec[place][width] for p, width in widths.items()}
        assert all(math.isfinite(r["measured"]) and r["damping"] > 0 for r in parts.values())
    page = (out / "report.html").read_text()
    assert 'id="blocks"' in page and f"{rows[-1]['before']} → {rows[-1]['after']}" in page
    assert all("too few images to hold some out" in r["fallback"] for r in rows if r["part"] in ("mlp", "vo"))
    assert 'class="tag warn"' in page
