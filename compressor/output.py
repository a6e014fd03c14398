"""Output that appears complete or not at all: written to a temporary sibling, then renamed."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import ConfigError

__all__ = ["check_file", "file_or_folder", "folder_output", "write_json", "write_text", "zip_folder"]


def _check(out: Path, *, force: bool, zipped: bool = False) -> None:
    if zipped and out.is_dir():
        raise ConfigError(
            f"{out}: a bundle as one .zip file must not take the place of a folder.",
            hint=f"Choose another --out, for example {out}.zip.",
        )
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not force:
        raise ConfigError(
            f"{out}: output must not exist yet.", hint="Choose another --out, or add --force to replace it."
        )
    if out.is_dir() and (out.is_mount() or Path.cwd().is_relative_to(out.resolve())):
        raise ConfigError(
            f"{out}: output must be a folder that can be replaced, got a mount point or the current folder.",
            hint=f"Choose a new folder, for example {out / 'bundle'}.",
        )
    if out.is_dir() and occupied and not (out / "manifest.json").is_file():
        raise ConfigError(
            f"{out}: --force replaces bundles only, got a folder without manifest.json.", hint="Choose another --out."
        )
    _check_parent(out)


def _check_parent(out: Path) -> None:
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{out}: the folder {parent} must exist.", hint="Create it first.")


def check_file(out: Path, *, force: bool) -> None:
    """Refuse `out` as the one file that a command writes.

    Raises:
        ConfigError: it is a folder, lies in none, or is a file with content, without `force`.
    """
    if out.is_dir():
        raise ConfigError(f"{out}: output must be a file, got a folder.", hint="Choose another --out.")
    if out.is_file() and out.stat().st_size > 0 and not force:
        raise ConfigError(
            f"{out}: output must not exist yet.", hint="Choose another --out, or add --force to replace it."
        )
    _check_parent(out)


@contextmanager
def folder_output(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends without an error, and vanishes when it does not.

    Raises:
        ConfigError: `out` exists and is not empty, without `force`; with it, it is no bundle; or it cannot be replaced. The
            same when the block ends, for what appeared meanwhile.
    """
    _check(out, force=force)
    out = out.resolve()  # a link stays, and what it leads to is replaced
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield work
        _check(out, force=force)  # again: another run, or somebody, may have put something there since
        work.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        elif out.exists():
            out.unlink()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def file_or_folder(out: Path, *, force: bool, zipped: bool) -> Iterator[Path]:
    """A folder to fill that becomes `out`: as it is, or as one .zip file.

    Raises:
        ConfigError: as `folder_output` does; or one file would replace a folder.
    """
    if not zipped:
        with folder_output(out, force=force) as folder:
            yield folder
        return
    _check(out, force=force, zipped=True)
    with tempfile.TemporaryDirectory(prefix="vitrim-") as work:
        yield Path(work)
        _check(out, force=force, zipped=True)
        zip_folder(Path(work), out)


def zip_folder(folder: Path, out: Path) -> None:
    """`folder` as one .zip at `out`; same content, same bytes."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON; NaN is a bug, not a value."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> Path:
    """`text` at `path`, complete or not at all; returns `path`. A pipe or a terminal is written to as it is.

    Raises:
        ConfigError: `path` is a folder or lies in none.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: output must be a file, got a folder.", hint="Choose another name.")
    _check_parent(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return path
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
