"""Output that appears whole or not at all, and what it may replace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.output import check_file, file_or_folder, folder_output, write_text


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


@pytest.mark.parametrize("content", [[], ["manifest.json"]])
def test_one_zip_does_not_take_the_place_of_a_folder_and_says_so_before_the_work(
    tmp_path: Path, content: list[str]
) -> None:
    (tmp_path / "b").mkdir()
    for name in content:
        (tmp_path / "b" / name).write_text("old")
    with (
        pytest.raises(ConfigError, match=r"one \.zip file must not take the place of a folder"),
        file_or_folder(tmp_path / "b", force=True, zipped=True),
    ):
        pytest.fail("the work was begun")
    assert [f.name for f in (tmp_path / "b").iterdir()] == content
    (tmp_path / "old.zip").write_text("old")
    with file_or_folder(tmp_path / "old.zip", force=True, zipped=True) as folder:  # the control: a file is replaced
        (folder / "manifest.json").write_text("new")
    assert (tmp_path / "old.zip").read_bytes().startswith(b"PK")


def test_a_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    check_file(notes, force=False)
    notes.write_text("")
    check_file(notes, force=False)  # nothing to lose
    notes.write_text("mine")
    with pytest.raises(ConfigError, match="must not exist") as caught:
        check_file(notes, force=False)
    assert "--force" in str(caught.value.hint)
    check_file(notes, force=True)
    with pytest.raises(ConfigError, match="must be a file, got a folder"):
        check_file(tmp_path, force=True)
    with pytest.raises(ConfigError, match=r"the folder .* must exist"):
        check_file(tmp_path / "no" / "page.html", force=True)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "page")
        assert os.read(reader, 10) == b"page"
    finally:
        os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and not pipe.is_file()


@pytest.mark.parametrize("zipped", [False, True])
def test_what_appeared_during_the_work_is_not_replaced(tmp_path: Path, zipped: bool) -> None:
    """Another run's bundle, or somebody's folder; with force a bundle is replaced, and a folder still is not."""

    def run(out: Path, appeared: str, *, force: bool = False) -> None:
        with file_or_folder(out, force=force, zipped=zipped) as folder:
            (folder / "manifest.json").write_text("new")
            if zipped and appeared == "manifest.json":
                out.write_text("theirs")
            else:
                out.mkdir()
                (out / appeared).write_text("theirs")

    for name, appeared, force in (("a", "manifest.json", False), ("b", "thesis.txt", False), ("c", "thesis.txt", True)):
        with pytest.raises(ConfigError, match=r"must not exist|bundles only|must not take"):
            run(tmp_path / name, appeared, force=force)
        kept = tmp_path / name if (tmp_path / name).is_file() else tmp_path / name / appeared
        assert kept.read_text() == "theirs"
    run(tmp_path / "d", "manifest.json", force=True)
    assert (tmp_path / "d").is_file() is zipped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("name", "says"), [("none/x.html", "the folder .*none must exist"), (".", "must be a file")])
def test_a_text_that_cannot_be_written_is_named_as_it_was_given(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        write_text(tmp_path / name, "text")
    assert ".partial" not in str(caught.value)
    assert write_text(tmp_path / "x.html", "text").read_text() == "text"
