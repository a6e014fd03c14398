"""The page: self-contained, escaped, complete where the report is and silent where it is not; looked at by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.errors import ConfigError, DataError
from compressor.history import change_points
from compressor.report import contact_sheet, render
from compressor.report.charts import PERCENT, Axis, Point, scatter
from compressor.report.page import page
from compressor.report.trend import Series, render_history
from compressor.types import latency_ms
from tests.core.pages import Page, everything, report

SECTIONS = {"targets", "chips", "front", "ecdf", "blocks", "sensitivity", "parity", "contact", "provenance"}


def test_render_shows_every_section_the_report_has() -> None:
    page = Page(render(everything()))
    assert page.ids == SECTIONS
    for text in (
        "3.0",
        "w8a8",
        "91.50 %",
        "was 91.85 %",
        "-0.35 points",
        "50 % fewer",
        "768 → 384",
        "blocks.0.fc1.matmul",
        "5 of 512 images.",
    ):
        assert text in page.text, text
    assert re.search(
        r"2\.9\dx, 95 % interval 2\.\d\d to 3\.\d\d|3\.0\dx, 95 % interval", page.text
    )  # paired samples give the speed-up's


@pytest.mark.parametrize("missing", ["blocks", "candidates", "ops", "sensitivity", "contact_sheet", "provenance"])
def test_render_leaves_out_what_is_missing(missing: str) -> None:
    part = everything()
    del part[missing]
    if missing == "provenance":
        del part["timings_s"]
    section = {"candidates": "front", "contact_sheet": "contact", "ops": "targets"}.get(missing, missing)
    page = Page(render(part))
    assert (section in page.ids) is (missing == "ops")  # only its own section goes
    assert ("blocks.0.fc1.matmul" in page.text) is (missing != "ops")


def test_render_of_the_least_report_claims_nothing_it_does_not_know() -> None:
    bare = report()
    bare["compressed"] |= {"top1": None, "top1_ci95": None}
    page = Page(render(bare))
    assert page.ids == {"targets", "parity"}
    assert "Top-1" not in page.text
    assert "interval" not in page.text
    assert "images have no labels" in page.text


def test_render_shows_what_compilers_say_of_chips_that_are_not_here() -> None:
    """Also where nothing was timed at all; a chip that compiled shows no plan and the other way round."""
    full = everything()
    text = Page(render(full)).text
    for said in (
        "5.96 ms estimated by HBDK 3.49.15 timing model, without: reading the image",
        "90 % of MACs on the accelerator, in 2 pieces; on the CPU: blocks.0.softmax",
        "additions: int8",
        "measured: vitrim: divergence <0.001",
        "tensorrt: a build plan, not checked here (no builder here)",
        "0.998000",
    ):
        assert said in text, said
    alone = report(targets=[], compiled=full["compiled"])
    page = Page(render(alone))
    assert page.ids == {"chips", "parity"} and "build plan" not in page.text
    page = Page(render(report(plans=full["plans"])))
    assert "chips" in page.ids and "vendor's compiler" not in page.text


def test_render_says_slower_when_it_is_slower() -> None:
    slow = report()
    slow["targets"][0] |= {"latency_ms": latency_ms((9_000_000,) * 9), "reverted": True}
    text = Page(render(slow)).text
    assert re.search(r"1\.\d\dx slower", text)
    assert "faster" not in text
    assert "reverted" in text


def test_the_page_needs_no_network_and_runs_no_script() -> None:
    text = render(everything())
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "link"} & page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "default-src 'none'" in text


NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def test_every_name_is_escaped() -> None:
    full = everything()
    full["model"] = NASTY
    full["targets"][0] |= {"name": NASTY, "precision": NASTY, "reason": NASTY}
    for candidate in full["candidates"]:
        candidate |= {"target": NASTY, "precision": NASTY}
    full["ops"] = {NASTY: [{**full["ops"]["ort"][0], "name": NASTY, "type": NASTY}]}
    full["blocks"][1]["fallback"] = NASTY
    full["sensitivity"] |= {"rows": [NASTY], "columns": [NASTY, NASTY], "unit": NASTY}
    full["contact_sheet"]["caption"] = NASTY
    full["provenance"] = {NASTY: NASTY}
    text = render(full)
    page = Page(text)  # which also refuses event handlers
    assert not {"script"} & page.tags
    assert page.links == [full["contact_sheet"]["image"]]
    assert "<script" not in text
    assert "{{ 7 * 7 }}" in page.text  # shown, not evaluated
    assert page.text.count("alert(1)") >= 10  # the names did arrive


def test_a_contact_sheet_from_elsewhere_is_refused() -> None:
    with pytest.raises(DataError, match=r"contact_sheet\.image must be an embedded PNG"):
        render(report(contact_sheet={"image": "https://example.org/x.png"}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"targets": [{}]}, "is missing"),
        ({"reference": None}, "NoneType"),
        ({"blocks": [3]}, "not subscriptable|not iterable"),
        ({"reference": {**report()["reference"], "params": 0}}, "division by zero"),
        (
            {"targets": [{**report()["targets"][0], "latency_ms": dict.fromkeys(("min", "p50", "p90"), 0.0)}]},
            "division",
        ),
    ],
)
def test_render_refuses_what_is_not_a_report(change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        render(report(**change))


def test_contact_sheet_refuses_what_are_not_images() -> None:
    with pytest.raises(ConfigError, match=r"must be \(n, H, W, C\) uint8 and not none, got float64 \(2, 2\)"):
        contact_sheet(np.zeros((2, 2)))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (99.2, 100.0), (-3.0, 12000.0), (1e-6, 2e-6)])
def test_axis_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 100, "").ticks()
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_scatter_labels_do_not_lie_on_each_other() -> None:
    points = [Point(1.0 + 0.02 * i, 100.0, f"candidate {i}", i) for i in range(4)]
    found = re.findall(
        r'<text class="mark" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', scatter(points, "x", "y")
    )
    boxes = []
    for x, y, anchor, label in found:
        wide = 6.4 * len(label)
        left = float(x) - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        boxes.append((left, float(y) - 11, left + wide, float(y) + 3))
    assert len(boxes) == 4
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def slower(runs: int = 24, at: int = 15, **changes: Any) -> Series:
    """A history whose candidate became 20 % slower at run `at` + 1; the last run failed, the first was inconclusive."""
    rng, verdicts = np.random.default_rng(0), {0: "inconclusive", runs - 1: "fail"}
    ms = [float((5.0 if i < at else 6.0) * np.exp(0.01 * rng.normal())) for i in range(runs)]
    entries = [
        {
            "candidate": f"b{i}",
            "verdict": verdicts.get(i, "pass"),
            "latency_ms": {"candidate": v, "baseline": 5.0},
            **changes,
        }
        for i, v in enumerate(ms)
    ]
    return Series("target ort, threads 1, batch 1", "CPU A", entries, ms, change_points(ms))


def test_history_marks_where_the_level_changed() -> None:
    text = render_history("gates", [slower()])
    page = Page(text)
    assert text.count('class="change"') == 1 and "run 16" in page.text
    assert "runs: 24; changes of level: 1." in page.text
    assert re.search(r"\+(19|20|21)\.\d %", page.text)
    assert text.count("<circle") == 24 and text.count("s4 dot") == 1 and text.count("s4 ring") == 1
    (line,) = re.findall(r'class="change" x1="([\d.]+)"', text)
    left, right = (float(x) for x in re.findall(r'<circle[^>]*cx="([\d.]+)"', text)[14:16])
    assert left < float(line) < right
    assert not {"script", "iframe", "link"} & page.tags and page.links == []


def test_history_without_a_change_marks_none() -> None:
    text = render_history("gates", [slower(at=24)])
    assert 'class="change"' not in text and "changes of level: none found" in text


def test_history_escapes_what_it_read() -> None:
    text = render_history(NASTY, [replace(slower(candidate=NASTY, verdict=NASTY), title=NASTY, device=NASTY)])
    page = Page(text)
    assert not {"script", "img"} & page.tags and page.text.count("alert(1)") > 24


def side_by_side(name: str = "old") -> str:
    return page("compare", names=[name, "new"], rows=[(name, ["1", name]), ("ort p50 ms", ["2", ""])], warnings=[name])


def test_side_by_side_shows_every_cell_and_escapes_it() -> None:
    found = Page(side_by_side(NASTY))
    assert found.ids == {"warnings", "compare"} and found.text.count(NASTY) == 4
    assert not {"script", "img"} & found.tags and found.links == []


@pytest.mark.parametrize("runs", [1, 2, 300])
def test_history_of_any_length_is_drawn_over_whole_runs(runs: int) -> None:
    text = render_history("gates", [slower(runs)])
    assert text.count("<circle") == runs
    numbers = re.findall(r'class="tick"[^>]*text-anchor="middle">([^<]+)<', text)
    assert numbers and all(number.isdigit() for number in numbers)


def ticks(svg: str) -> list[float]:
    """What is written beside the y axis."""
    return [float(v) for v in re.findall(r'class="tick"[^>]*text-anchor="end">([^<]+)<', svg)]


@pytest.mark.parametrize("agreements", [(100.0, 100.0), (99.0, 100.0), (40.0, 99.9), (100.0,)])
def test_no_axis_of_shares_goes_beyond_a_hundred(agreements: tuple[float, ...]) -> None:
    points = [Point(1.0 + i, a, f"c{i}", 0) for i, a in enumerate(agreements)]
    assert max(ticks(scatter(points, "ms", "%", PERCENT))) <= 100.0
    axis = Axis.around(agreements, (0, 100), "%", PERCENT)
    assert axis.low < min(agreements) and axis.high <= 100.0
    assert Axis.around(agreements, (0, 100), "%").high > max(agreements)  # the limit is what keeps it


def test_the_accuracy_chart_of_a_report_ends_at_a_hundred() -> None:
    full = everything()
    for candidate in full["candidates"]:
        candidate["agreement"] = 100.0
    (front,) = re.findall(r'<section id="front">.*?</section>', render(full), re.S)
    assert max(ticks(front)) == 100.0


def drawn(tmp_path: Path, text: str, width: int) -> np.ndarray:
    """The page as headless Chromium draws it, (H, W, 3); anything it complains about is an error."""
    from PIL import Image

    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    file.write_text(text, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0")
    places = (f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={shot}")
    command = [str(BROWSER), *options, *places, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr  # where a page's errors and refused loads are reported
    return np.asarray(Image.open(shot).convert("RGB"), dtype=np.int64)


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is installed: `apt-get install chromium` to have the page drawn"
)
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("kind", ["report", "history", "compare"])
def test_a_browser_draws_the_page_without_an_error_and_without_sideways_scrolling(
    tmp_path: Path, kind: str, width: int
) -> None:
    pages = {
        "report": lambda: render(everything()),
        "history": lambda: render_history("gates", [slower(), slower(runs=2)]),
        "compare": side_by_side,
    }
    pixels = drawn(tmp_path, pages[kind](), width)
    assert pixels.shape[1] == width
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something was drawn
    background = pixels[-1, 0]
    assert (pixels[:, -4:] == background).all()  # nothing reaches the right edge, so nothing is cut off
