"""Output that appears whole or not at all, and what it may replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.output import folder_output


def write(out: Path, *, force: bool = False, text: str = "new") -> None:
    with folder_output(out, force=force) as folder:
        (folder / "manifest.json").write_text(text)


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real/manifest.json").read_text() == "new"


def test_force_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "b", text="old")
    with pytest.raises(ConfigError, match="must not exist"):
        write(tmp_path / "b")
    write(tmp_path / "b", force=True)
    assert (tmp_path / "b/manifest.json").read_text() == "new"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("cat")
    with pytest.raises(ConfigError, match="bundles only"):
        write(tmp_path / "photos", force=True)
    assert (tmp_path / "photos/cat.jpg").read_text() == "cat"


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_the_folder_one_stands_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    write(tmp_path / "b", text="old")
    (tmp_path / "b" / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "b" / inside)
    with pytest.raises(ConfigError, match="current folder"):
        write(tmp_path / "b", force=True)
    assert (tmp_path / "b/manifest.json").read_text() == "old"


def test_what_failed_leaves_the_old_in_place(tmp_path: Path) -> None:
    write(tmp_path / "b", text="old")
    with pytest.raises(RuntimeError), folder_output(tmp_path / "b", force=True) as folder:
        (folder / "manifest.json").write_text("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["b"] and (tmp_path / "b/manifest.json").read_text() == "old"
