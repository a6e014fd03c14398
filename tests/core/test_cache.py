"""The cache of finished stages: reuse, eviction beside other runs, and nothing left where nothing is to be kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor import cache
from compressor.cache import Cache


def filled(folder: Path) -> None:
    (folder / "x").write_bytes(b"12345678")


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    kept = Cache(tmp_path)
    first, reused = kept.fetch("a", filled)
    again, found = kept.fetch("a", lambda folder: pytest.fail("made again"))
    assert (first, reused, found) == (again, False, True) and kept.fetch("b", filled)[1] is False


def test_what_is_not_kept_goes_with_its_owner() -> None:
    owner = Cache(None)
    folder, _ = owner.fetch("a", filled)
    assert (folder / "x").is_file()
    del owner
    assert not folder.exists() and not folder.parent.exists()


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        filled(folder)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Cache(tmp_path).fetch("a", fails)
    assert list(tmp_path.iterdir()) == []


def test_eviction_spares_the_newest_and_what_another_run_is_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LIMIT_BYTES", 10)
    kept = Cache(tmp_path)
    for name, age in ((".new-running", 60), (".new-killed", 1e6), ("old", 1e5), ("older", 2e5)):
        (tmp_path / name).mkdir()
        filled(tmp_path / name)
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    kept.fetch("new", filled)
    assert {p.name for p in tmp_path.iterdir()} == {"new", "old", ".new-running"}


def test_two_runs_that_finish_the_same_stage_agree(tmp_path: Path) -> None:
    kept = Cache(tmp_path)

    def overtaken(folder: Path) -> None:
        filled(folder)
        (tmp_path / "a").mkdir()  # the other run was faster
        filled(tmp_path / "a")

    assert kept.fetch("a", overtaken)[0] == tmp_path / "a"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
