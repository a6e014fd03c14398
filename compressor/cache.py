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
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Cache", "default_folder", "key"]

LIMIT_BYTES = 4 << 30


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
    """`folder` None means nothing is kept and everything is made again."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def fetch(self, name: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Folder of entry `name`, made by ``make(folder)`` unless it is there already.

        Returns:
            The folder, and whether it was reused. Without a cache the folder is a temporary one that the caller may delete.
        """
        if self.folder is None:
            folder = Path(tempfile.mkdtemp(prefix="vitrim-"))
            make(folder)
            return folder, False
        entry = self.folder / name
        if entry.is_dir():
            os.utime(entry)
            return entry, True
        self.folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            make(work)
            if not entry.exists():  # another run may have finished the same stage meanwhile
                work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._evict(keep=entry)
        return entry, False

    def _evict(self, keep: Path) -> None:
        assert self.folder is not None
        entries = sorted(
            (p for p in self.folder.iterdir() if p.is_dir() and p != keep), key=lambda p: p.stat().st_mtime
        )
        sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in entries}
        excess = sum(sizes.values()) - LIMIT_BYTES
        for entry in entries:
            if excess <= 0:
                break
            shutil.rmtree(entry, ignore_errors=True)
            excess -= sizes[entry]
