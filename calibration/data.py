"""Readers of images and labels: embedded data, class folders, flat folders, .npz. Every refusal names the file.

An `ImageSet` holds paths or stored arrays, never a folder's decoded pixels; `batches` streams them in bounded memory.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from calibration.image import DECODE_ERRORS, SUFFIXES, about, read_image
from calibration.preprocess import apply
from compressor.errors import ConfigError, DataError, unknown_name
from compressor.types import Array, Preprocess

__all__ = ["ImageSet", "batches", "match_labels", "open_images", "read_image", "stratified"]

EMBEDDED = {"demo": "calibration.npz", "demo:eval": "evaluation.npz"}
MAX_ARRAY_BYTES = 8 << 30  # of one .npz member, unpacked


# --------------------------------------------------------------------------- image sets


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order, labelled or not.

    Attributes:
        source: what the user asked for, e.g. ``demo`` or a path.
        names: one printable name per image: the path inside the folder, or ``file[index]``.
        items: where each image is: a path, or a uint8 array (H, W, C).
        labels: int64 (len,), None when unlabelled: an index into `class_names`, or a class index when there are none.
        class_names: names of the class folders, sorted; empty for .npz and flat folders.
        ignored: how many files of the folder are not images.
    """

    source: str
    names: tuple[str, ...]
    items: tuple[Path | Array, ...]
    labels: Array | None = None
    class_names: tuple[str, ...] = ()
    ignored: int = 0

    def __post_init__(self) -> None:
        count = len(self.items)
        if count == 0:
            raise DataError(f"{self.source}: must hold at least one image, got none.", hint="Add images.")
        if self.labels is not None and self.labels.shape != (count,):
            got = self.labels.shape
            raise DataError(
                f"{self.source}: labels must have shape ({count},), got {got}.", hint="One label per image."
            )

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> Image.Image | Array:
        """Image `i`: PIL in mode L or RGB, upright, for a file; uint8 (H, W, C) for a stored array."""
        item = self.items[i]
        return read_image(item) if isinstance(item, Path) else item

    def subset(self, indices: Sequence[int] | Array) -> ImageSet:
        """The images at `indices`, in that order; class names stay."""
        chosen = [int(i) for i in indices]
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            items=tuple(self.items[i] for i in chosen),
            labels=None if self.labels is None else self.labels[chosen],
        )

    def content_hashes(self) -> tuple[str, ...]:
        """sha256 of each image, of the file's bytes or a stored array's shape and pixels: equal hash, same image."""
        return self._hashes

    @cached_property
    def _hashes(self) -> tuple[str, ...]:
        return tuple(_content_hash(item) for item in self.items)

    def digest(self) -> str:
        """sha256 over the content hashes in order: names this very list of images."""
        total = hashlib.sha256()
        for image in self.content_hashes():
            total.update(bytes.fromhex(image))
        return total.hexdigest()


def _content_hash(item: Path | Array) -> str:
    if isinstance(item, np.ndarray):
        return hashlib.sha256(f"{item.shape}".encode() + item.tobytes()).hexdigest()
    try:
        with item.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(item, error) from None


def open_images(source: str, *, limit: int | None = None, seed: int = 0) -> ImageSet:
    """The images of `source`, or a random `limit` of them that keeps the balance of the classes.

    Args:
        source: ``demo`` (500 calibration images), ``demo:eval`` (2,000 evaluation images), an ImageFolder (class
            subfolders, sorted, are the labels), a flat folder (unlabelled), or an ``.npz`` with ``images`` uint8
            (N, H, W, C) or (N, H, W) and optional integer ``labels`` (N,). A folder called demo is ``./demo``.
        limit: how many images at most; None for all.
        seed: of the choice; the same seed chooses the same images.

    Raises:
        DataError: nothing there, no image in it, or not readable as described.
        ConfigError: `limit` below 1, or an unknown ``demo:`` name.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"number of images must be at least 1, got {limit}.", hint="Leave it out to use every image.")
    path = Path(source)
    if source in EMBEDDED:
        images = _open_npz(Path(str(resources.files("compressor") / "demo" / EMBEDDED[source])), source)
    elif source.startswith("demo:"):
        raise unknown_name("data", source, EMBEDDED)
    elif path.is_dir():
        images = _open_folder(path, source)
    elif path.is_file() and path.suffix.lower() == ".npz":
        images = _open_npz(path, source)
    else:
        found = "another kind of file" if path.exists() else "nothing there"
        hint = "Use demo, a folder or an .npz file."
        raise DataError(f"{source}: data must be a folder of images or an .npz file, found {found}.", hint=hint)
    return images if limit is None else stratified(images, limit, seed)


def stratified(images: ImageSet, limit: int, seed: int) -> ImageSet:
    """At most `limit` of the images, chosen at random class by class, in their original order.

    The r-th image (random order, from 0) of a class of n has key (r + 1/2) / n; the smallest keys are taken. That hands
    out the places by the Sainte-Lague method: shares are kept as well as whole images allow. Unlabelled images are one
    class.
    """
    if limit >= len(images):
        return images
    order = np.random.default_rng(seed).permutation(len(images))  # also breaks ties between classes
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    sizes, seen = Counter(labels.tolist()), Counter[int]()
    keys = np.empty(len(images))
    for position, label in enumerate(labels[order].tolist()):
        keys[position] = (seen[label] + 0.5) / sizes[label]
        seen[label] += 1
    return images.subset(np.sort(order[np.argsort(keys, kind="stable")[:limit]]))


def batches(
    images: ImageSet, preprocess: Preprocess, batch_size: int, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[Array]:
    """Preprocessed batches, float32 (B, C, h, w), in order; the last may be smaller. One pass, one batch in memory.

    Args:
        images: what to read.
        preprocess: the model's contract.
        batch_size: B.
        on_progress: called with (images done, images in all) before each batch is handed out.

    Raises:
        DataError: an image cannot be read or used, by name.
        ConfigError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, got {batch_size}.", hint="Use 1 or more.")
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        batch = np.stack([_pixels(images, i, preprocess) for i in range(start, stop)])
        if on_progress is not None:
            on_progress(stop, len(images))
        yield batch


def _pixels(images: ImageSet, i: int, preprocess: Preprocess) -> Array:
    image = images.read(i)
    with about(images.names[i]):
        return apply(preprocess, image)


# --------------------------------------------------------------------------- labels


def match_labels(images: ImageSet, labels: Sequence[str], num_classes: int = 0) -> Array:
    """The model's class index of each image, int64 (len,).

    The first rule that applies:

    1. an ``.npz`` holds class indices already;
    2. class folders named like the model's classes (case, spaces and punctuation ignored) are matched by name, in any
       order and not necessarily all classes; then one folder without a class of its name is an error;
    3. class folders that are all named by a number (``0``, ``07``, ``10``) are class indices;
    4. otherwise the sorted folders are classes 0, 1, 2, ... and their number must be the model's.

    Args:
        images: labelled images.
        labels: the model's class names; empty when it has none.
        num_classes: needed only when `labels` is empty.

    Raises:
        DataError: no labels, or they cannot be the model's.
    """
    source, folders, count = images.source, images.class_names, len(labels) or num_classes
    if images.labels is None:
        hint = "Use class subfolders, or an .npz with labels."
        raise DataError(f"{source}: must have labels to measure accuracy, got none.", hint=hint)
    if count < 1:
        hint = "Use a model with a classifier."
        raise DataError("the model must have classes to measure accuracy, got a feature extractor.", hint=hint)
    lookup = _by_name(source, folders, labels)
    if lookup is None and folders and all(re.fullmatch(r"[0-9]+", name) for name in folders):
        lookup = [int(name) for name in folders]
    elif lookup is None and folders and len(folders) != count:
        hint = "Name the folders after the model's classes, or give one for each class."
        raise DataError(f"{source}: must have {count} class folders like the model, got {len(folders)}.", hint=hint)
    found = images.labels if lookup is None else np.array(lookup)[images.labels]
    if found.max() >= count:
        got, hint = found.max(), "Class indices count from 0."
        raise DataError(f"{source}: class indices must be below the model's {count} classes, got {got}.", hint=hint)
    return found


def _by_name(source: str, folders: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Class index of each folder by name, or None when no folder has a class's name."""
    plain = [_plain(name) for name in labels]
    uses = Counter(plain)
    index = {name: i for i, name in enumerate(plain) if name and uses[name] == 1}  # a name used twice matches nothing
    if not any(_plain(folder) in index for folder in folders):
        return None
    for folder in folders:
        if _plain(folder) not in index:
            close = difflib.get_close_matches(_plain(folder), index, n=1)
            hint = f"Did you mean {labels[index[close[0]]]!r}?" if close else "Rename the folder or move it away."
            raise DataError(f"{source}: class folder {folder!r} must be named like a class of the model.", hint=hint)
    return [index[_plain(folder)] for folder in folders]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


# --------------------------------------------------------------------------- folders


def _open_folder(folder: Path, source: str) -> ImageSet:
    """Class subfolders, or a flat folder. An empty class folder stays a class, so that the others keep their index."""
    try:
        entries = [e for e in sorted(folder.iterdir()) if not _hidden(e)]
        folders = [e for e in entries if e.is_dir()]
        above = frozenset({_identity(folder)})
        flat, *classes = [_images([e for e in entries if not e.is_dir()]), *(_images(_walk(f, above)) for f in folders)]
        ignored = flat[1] + sum(count for _, count in classes)
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from None
    nested = [file for files, _ in classes for file in files]
    if flat[0] and nested:
        got, hint = f"{len(flat[0])} images beside {len(folders)} folders", "Move the images into a class folder."
        raise DataError(f"{source}: must hold class folders or images, got {got}.", hint=hint)
    if not flat[0] and not nested:
        hint = f"Images end in {', '.join(sorted(SUFFIXES))}."
        raise DataError(f"{source}: must hold at least one image, got none ({ignored} other files).", hint=hint)
    paths = tuple(nested or flat[0])
    names = tuple(_printable(path.relative_to(folder)) for path in paths)
    if not nested:
        return ImageSet(source, names, paths, ignored=ignored)
    labels = np.repeat(np.arange(len(classes)), [len(files) for files, _ in classes])
    return ImageSet(source, names, paths, labels, tuple(_printable(Path(f.name)) for f in folders), ignored)


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Every file below `folder`, sorted, links followed; a link back to a folder above is refused."""
    identity = _identity(folder)
    if identity in above:
        raise DataError(
            f"{str(folder)!r}: a link must not lead back to a folder that holds it.", hint="Remove the link."
        )
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            yield entry
        elif not _hidden(entry):
            yield from _walk(entry, above | {identity})


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _images(files: Iterator[Path] | list[Path]) -> tuple[list[Path], int]:
    """The image files, and how many others there are."""
    images, others = [], 0
    for file in files:
        if _hidden(file) or file.suffix.lower() not in SUFFIXES:
            others += 1
        elif not file.is_file():
            raise DataError(f"{str(file)!r}: must be a file, got a broken link or a device.", hint="Remove it.")
        else:
            images.append(file)
    return images, others


def _hidden(path: Path) -> bool:
    """Whether the name is the system's: ``.git``, ``._photo.jpg``, ``__MACOSX``."""
    return path.name.startswith((".", "__MACOSX"))


def _printable(path: Path) -> str:
    """A name that any terminal, log or JSON file takes, also for a file name that is not valid UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{str(path)!r}: must be readable, got: {error.strerror}.", hint="Check its permissions.")


# --------------------------------------------------------------------------- .npz


def _open_npz(path: Path, source: str) -> ImageSet:
    with about(source):
        arrays = _read_npz(path)
        images = _checked_images(arrays["images"])
        labels = arrays.get("labels")
        if labels is not None:
            if labels.dtype.kind not in "iu" or (labels.astype(np.int64) < 0).any():  # from 2**63 they wrap
                raise DataError(f"labels must be integers from 0, got {labels.dtype}.", hint="Store class indices.")
            labels = labels.astype(np.int64)
    names = tuple(f"{path.name}[{i}]" for i in range(len(images)))
    return ImageSet(source, names, tuple(images), labels)


def _checked_images(images: Array) -> Array:
    stored, images = images, images[:, :, :, None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        got, hint = f"{stored.dtype} {stored.shape}", "Store 0..255 with the channels last."
        raise DataError(f"images must be uint8 (N, H, W, 1 | 3 | 4), got {got}.", hint=hint)
    if 0 in images.shape:
        raise DataError(f"images must hold at least one image, got shape {stored.shape}.", hint="Store some.")
    return images


def _read_npz(path: Path) -> dict[str, Array]:
    """``images`` and, when there, ``labels``; nothing else in the file is read, and no pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
        if "images.npy" not in sizes:
            raise DataError(f"must hold an array 'images', got {sorted(sizes)}.", hint="Use np.savez(f, images=...).")
        if max(sizes.values()) > MAX_ARRAY_BYTES:
            raise DataError(
                f"arrays must have at most {MAX_ARRAY_BYTES} bytes, got {max(sizes.values())}.", hint="Split it."
            )
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in ("images", "labels") if name in data}
    except (zipfile.BadZipFile, *DECODE_ERRORS) as error:
        raise DataError(f"must be an undamaged .npz without objects, got: {error}.", hint="Write it again.") from None
