"""``manifest.json``: what a bundle says of itself, the digest of every file, and the seal that writes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import BundleError, ConfigError
from compressor.types import Artifact, Precision, Preprocess, TensorSpec, VitSpec

__all__ = [
    "CALIBRATED_ON",
    "MAX_FILE_BYTES",
    "Manifest",
    "TargetEntry",
    "artifact_entry",
    "artifact_of",
    "inside",
    "read_manifest",
    "seal",
    "sha256_file",
]

CALIBRATED_ON = "calibration.sha256"  # content hash of every calibration image, one a line
MAX_FILE_BYTES = 8 << 30  # larger than any ViT; bounds what a hostile manifest or archive can make us read
MAX_NAME_BYTES = 255  # of a path in the bundle: no file system refuses it


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Strict):
    """Digest and size of one file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0, le=MAX_FILE_BYTES)


class TensorEntry(_Strict):
    """An artifact's input or output."""

    name: str
    dtype: str
    shape: list[int] = Field(min_length=2)  # -1 or the batch first


class TargetEntry(_Strict):
    """One target's artifact: its main file, precision, and what `open` needs beside it."""

    path: str
    files: list[str] = Field(min_length=1)  # all of them, in the target's order, main file included
    sha256: str  # of `files` one after the other
    precision: Precision
    settings: dict[str, str] = {}
    inputs: list[TensorEntry] = Field(min_length=1)
    outputs: list[TensorEntry] = Field(min_length=1)


class _Version(BaseModel):
    """What every version of manifest.json has."""

    schema_version: int = Field(alias="schema")


class Manifest(_Strict):
    """manifest.json, version 1."""

    schema_version: Literal[1] = Field(alias="schema")
    spec: VitSpec
    preprocess: Preprocess
    labels: list[str]
    recipe: dict[str, Any]
    versions: dict[str, str]
    seed: int
    calibration: dict[str, Any]
    checkpoint: dict[str, Any]
    targets: dict[str, TargetEntry] = Field(min_length=1)
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        spec, images = self.spec, self.preprocess
        made = (images.size, 3 if images.channels == "RGB" else 1)
        if made != (spec.image_size, spec.in_chans):
            raise ConfigError(f"preprocess must make {spec.image_size} x {spec.in_chans}, got {made[0]} x {made[1]}.")
        if self.labels and len(self.labels) != spec.num_classes:
            raise ConfigError(f"labels must name {spec.num_classes} classes, got {len(self.labels)}.")
        return self


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def artifact_entry(artifact: Artifact, root: Path) -> TargetEntry:
    """The manifest's record of `artifact`, whose files lie under the bundle folder `root`."""

    def tensors(specs: tuple[TensorSpec, ...]) -> list[TensorEntry]:
        return [TensorEntry(name=t.name, dtype=t.dtype, shape=list(t.shape)) for t in specs]

    return TargetEntry(
        path=artifact.path.relative_to(root).as_posix(),
        files=[f.relative_to(root).as_posix() for f in artifact.files],
        sha256=artifact.sha256,
        precision=artifact.precision,
        settings=dict(artifact.settings),
        inputs=tensors(artifact.inputs),
        outputs=tensors(artifact.outputs),
    )


def artifact_of(target: str, entry: TargetEntry, root: Path) -> Artifact:
    """The artifact of `entry`, whose files lie under the folder `root`: the inverse of `artifact_entry`.

    Raises:
        BundleError: a path that reaches outside `root`.
    """
    files = tuple(inside(root, f) for f in entry.files)

    def specs(tensors: list[TensorEntry]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t.name, t.dtype, tuple(t.shape)) for t in tensors)

    return Artifact(
        target=target,
        path=inside(root, entry.path),
        sha256=entry.sha256,
        size_bytes=sum(f.stat().st_size for f in files),
        precision=entry.precision,
        inputs=specs(entry.inputs),
        outputs=specs(entry.outputs),
        settings=entry.settings,
        files=files,
    )


def seal(root: Path, content: Mapping[str, Any]) -> Manifest:
    """Write ``manifest.json`` over everything that lies in `root`: the last step of making a bundle.

    Args:
        root: the folder, complete but for the manifest.
        content: every manifest field except ``schema`` and ``files``.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    listing = {p.relative_to(root).as_posix(): {"sha256": sha256_file(p), "size": p.stat().st_size} for p in files}
    manifest = Manifest.model_validate({"schema": 1, **content, "files": listing})
    text = json.dumps(manifest.model_dump(by_alias=True), indent=1)
    (root / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle folder `root`.

    Raises:
        BundleError: missing, not as its schema wants it, or of a newer vitrim.
    """
    path = root / "manifest.json"
    if not path.is_file():
        raise BundleError(
            f"{root}: a bundle must hold manifest.json, found none.", hint="Make one with `vitrim compress`."
        )
    try:
        content = path.read_bytes()
        schema = _Version.model_validate_json(content).schema_version
        if schema > 1:
            raise BundleError(
                f"{path}: schema must be 1, got {schema}: a newer vitrim made this bundle.", hint="Update vitrim."
            )
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(f"{path}: {where} is not valid: {first['msg']}.", hint="Make the bundle again.") from None
    except ConfigError as error:  # raised by the records, and by the manifest, themselves
        raise BundleError(f"{path}: {error}", hint="Make the bundle again.") from None


def inside(root: Path, name: str) -> Path:
    """`root / name`.

    Raises:
        BundleError: it could lie outside `root`, or no file can have that name.
    """
    pure, path, hint = PurePosixPath(name), root / name, "Do not use this bundle."
    try:
        named = "\0" not in name and len(name.encode()) <= MAX_NAME_BYTES
        stays = named and path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # half a character; links that lead in a circle
        named = stays = False
    if not named:
        raise BundleError(
            f"{root}: file paths must be text of at most {MAX_NAME_BYTES} bytes, got {name[:40]!r}.", hint=hint
        )
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not stays:
        raise BundleError(f"{root}: file paths must stay inside the bundle, got {name!r}.", hint=hint)
    return path
