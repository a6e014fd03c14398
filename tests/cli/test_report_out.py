"""Where `vitrim report` writes: a file that exists is kept without --force, as with every other --out."""

from __future__ import annotations

import json

import pytest

from compressor.history import append

RUN = {"device": {"id": "d"}, "target": "ort", "threads": 1, "batch": 1, "latency_ms": {"candidate": 5.0}}


@pytest.fixture
def report(run, tmp_path):
    """`vitrim report --history ... --json` in this process: (exit code, its object)."""
    for _ in range(3):
        append(tmp_path / "history", RUN)

    def call(*arguments):
        code, answer, _ = run("report", "--history", tmp_path / "history", *arguments, "--json")
        return code, json.loads(answer)

    return call


def test_a_file_that_exists_is_replaced_by_force_only(report, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    code, answer = report("--out", notes)
    assert code == 2 and "--force" in answer["error"]["hint"] and notes.read_text() == "mine"
    assert report("--out", notes, "--force")[0] == 0 and "</html>" in notes.read_text()


def test_the_page_beside_what_it_is_of_is_made_again(report, tmp_path):
    assert [report()[0] for _ in range(2)] == [0, 0]
    assert "</html>" in (tmp_path / "history/history.html").read_text()
