"""JSON files of a checkpoint, checked before anything is believed: size, syntax, types, ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compressor.errors import CheckpointError

__all__ = ["parse", "read_json"]

T = TypeVar("T", bound=BaseModel)
MAX_BYTES = 64 * 1024 * 1024  # the largest real config (21 843 class names) is under 2 MB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable, over 64 MB, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: the file must be under {MAX_BYTES} bytes, got {path.stat().st_size}.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: the file must be readable, got {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the file must hold JSON, got {error}.", hint="Fetch it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: the file must hold a JSON object, got {type(content).__name__}.")
    return content


def parse(schema: type[T], content: Mapping[str, Any], where: str) -> T:
    """`content` as a `schema`; `where` is put before the key in messages.

    Raises:
        CheckpointError: the first value that breaks the schema, with its place and what was got.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        raise CheckpointError(f"{where}{place} is missing.")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        raise CheckpointError(f"{where}{place} is not a known key.")
    rule = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = repr(first["input"])
    raise CheckpointError(f"{where}{place} must be {rule}, got {got if len(got) < 80 else got[:76] + ' ...'}.")
