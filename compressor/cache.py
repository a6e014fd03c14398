"""Finished stages, kept by content: a repeated or interrupted run takes up where the last one stopped.

An entry is a folder named by the sha256 of everything that decides its content. It is written beside and renamed, so a
half-written entry does not exist. The oldest entries go when the cache outgrows its limit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["Cache", "default_folder", "key"]

LIMIT_BYTES = 4 << 30
UNFINISHED = ".new-"
ABANDONED_S = 86400.0  # an unfinished entry older than this was left by a run that was killed


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/vitrim``, by default ``~/.cache/vitrim``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrim"


def key(stage: str, **parts: Any) -> str:
    """Digest of a stage's name, its inputs and the code that makes it; `parts` must be JSON-serialisable."""
    text = json.dumps({"stage": stage, "code": _code_digest(), **parts}, sort_keys=True)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@functools.cache
def _code_digest() -> str:
    """sha256 over our own sources: a changed algorithm never meets an old result."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *(root.parent / "calibration").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Cache:
    """`folder` None means that every stage is done again, and nothing is kept longer than this object."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="vitrim-"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def fetch(self, name: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Folder of entry `name`, made by ``make(folder)`` unless it is there already; and whether it was."""
        entry = self.folder / name
        if entry.is_dir():
            os.utime(entry)
            return entry, True
        self.folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))
        try:
            make(work)
            try:
                work.rename(entry)
            except OSError:
                if not entry.is_dir():  # another run has not finished the same stage meanwhile
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._evict(keep=entry)
        return entry, False

    def _evict(self, keep: Path) -> None:
        """Remove the oldest entries beyond the limit; other runs may be adding, and removing, at the same time."""
        found, now = [], keep.stat().st_mtime
        for entry in self.folder.iterdir():
            with suppress(FileNotFoundError):
                used = entry.stat().st_mtime
                if entry != keep and not (entry.name.startswith(UNFINISHED) and used > now - ABANDONED_S):
                    found.append((used, sum(f.stat().st_size for f in entry.rglob("*") if f.is_file()), entry))
        excess = sum(size for _, size, _ in found) - LIMIT_BYTES
        for _, size, entry in sorted(found):
            if excess <= 0:
                break
            shutil.rmtree(entry, ignore_errors=True)
            excess -= size
