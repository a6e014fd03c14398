"""The bundle: a directory (or one .zip) that a device runs with numpy, pillow and one runtime.

    manifest.json   schema, spec, preprocess, labels, recipe, versions, seed, calibration, checkpoint, targets,
                    files{path: {sha256, size}}
    model.safetensors + config.json   the compressed float model, input of another compress, gate or target
    golden.npz      preprocessed inputs, reference logits, each target's outputs
    calibration.sha256   content hash of every calibration image, one a line: no accuracy is measured on them unsaid
    targets/<name>/ artifacts               report.json  report.html

Opening trusts nothing: the manifest is validated against its schema, every path must stay inside, every listed file must
have its size and sha256, no pickle is read, no code is run.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

import targets
from calibration.preprocess import apply
from compressor.errors import BundleError, unknown_name
from compressor.manifest import CALIBRATED_ON, MAX_FILE_BYTES, Manifest, artifact_of, inside, read_manifest, sha256_file
from compressor.types import Array, Artifact, Preprocess, Session, VitSpec
from compressor.verify import tolerance

__all__ = ["Bundle", "is_bundle"]

BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)  # what reading one may raise
# Read under these names, so that none may lie in a bundle without a digest. Not every bundle has them all.
READ_BY_NAME = (
    *("golden.npz", CALIBRATED_ON, "config.json", "preprocessor_config.json", "model.safetensors"),
    *("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def is_bundle(source: str) -> bool:
    """Whether `source` names a bundle, a folder or a zip file under any name, rather than a model."""
    path = Path(source)
    try:
        if (path / "manifest.json").is_file() or path.suffix == ".zip":
            return True
        with zipfile.ZipFile(path) as z:  # weights of PyTorch are zip files too
            names = [PurePosixPath(name).parts for name in z.namelist()]
    except BROKEN_ZIP:
        return False
    return any(len(parts) <= 2 and parts[-1:] == ("manifest.json",) for parts in names)


def _unzip(archive: Path, folder: Path) -> Path:
    """Extract a zipped bundle into `folder`, member by member, nothing outside and nothing unlisted in size."""
    try:
        with zipfile.ZipFile(archive) as z:
            total = sum(info.file_size for info in z.infolist())
            if total > MAX_FILE_BYTES:
                raise BundleError(
                    f"{archive}: must unpack to at most {MAX_FILE_BYTES} bytes, got {total}.",
                    hint="Do not use this bundle.",
                )
            for info in z.infolist():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile(f"compression method {info.compress_type} of {info.filename!r}")
                target = inside(folder, info.filename.rstrip("/"))
                if info.is_dir():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with z.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except BROKEN_ZIP as error:
        raise BundleError(f"{archive}: must be a readable zip file, got {error}.", hint="Copy it again.") from None
    members = list(folder.iterdir())  # where a file manager zipped the folder, that is all there is
    return members[0] if len(members) == 1 and members[0].is_dir() else folder


def _golden_problem(arrays: Mapping[str, Array], spec: VitSpec) -> str:
    """What golden.npz must hold and does not; empty if nothing is wrong with its `arrays`."""
    images = arrays.get("inputs")
    if images is None or not images.size or images.shape[1:] != (spec.in_chans, *spec.image_size):
        got = "none" if images is None else images.shape
        return f"inputs (n, {spec.in_chans}, {spec.image_size[0]}, {spec.image_size[1]}), got {got}"
    outputs = (len(images), spec.num_classes or spec.pooled_dim)
    if "reference" not in arrays:
        return "'reference', got none"
    for name, array in arrays.items():
        want = () if name.startswith("tolerance.") else images.shape if name == "inputs" else outputs
        if not np.issubdtype(array.dtype, np.floating) or array.shape != want or not np.isfinite(array).all():
            return f"finite numbers of shape {want} in {name!r}, got {array.dtype} {array.shape}"
    return ""


def _runs(name: str) -> bool:
    state = targets.get(name).available()
    return state.available and state.runs


def _checked(source: Path, path: str | Path) -> Manifest:
    """The manifest of the bundle unpacked at `source`, every file it lists checked; `path` is what errors name."""
    if not source.is_dir():
        raise BundleError(f"{path}: a bundle must be a folder or a .zip file, found neither.", hint="Check the path.")
    manifest = read_manifest(source)
    for name, entry in manifest.files.items():
        file = inside(source, name)
        if not file.is_file():
            raise BundleError(f"{path}: {name!r} is listed in the manifest but missing.", hint="Copy the bundle again.")
        if file.stat().st_size != entry.size or sha256_file(file) != entry.sha256:
            raise BundleError(
                f"{path}: {name!r} must have sha256 {entry.sha256[:12]}..., it was changed.",
                hint="Copy the bundle again.",
            )
    for name in READ_BY_NAME:
        if name not in manifest.files and (source / name).exists():
            raise BundleError(f"{path}: {name!r} must be listed in files.", hint="Do not use this bundle.")
    for target in manifest.targets.values():
        for name in (target.path, *target.files):
            if name not in manifest.files:
                raise BundleError(
                    f"{path}: target file {name!r} must be listed in files.", hint="Make the bundle again."
                )
    return manifest


class Bundle:
    """The bundle at `path`, a folder or a .zip, with every file's size and digest checked when it is opened.

    Raises:
        BundleError: missing, damaged, tampered with, or reaching outside itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.root, self._keep = Path(path), None
        self._sessions: dict[tuple[str, int], Session] = {}
        if not self.root.is_file():
            self.manifest = _checked(self.root, path)
            return
        self._keep = tempfile.TemporaryDirectory(prefix="vitrim-")
        try:
            self.root = _unzip(self.root, Path(self._keep.name))
            self.manifest = _checked(self.root, path)
        except BaseException:
            self._keep.cleanup()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """``Bundle(path)``, for those who read ``open`` more easily."""
        return cls(path)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        """What a .zip was unpacked to goes; sessions that are open stay usable, new ones cannot be opened."""
        if self._keep is not None:
            self._keep.cleanup()

    @property
    def preprocess(self) -> Preprocess:
        """The image contract the model was calibrated and evaluated with."""
        return self.manifest.preprocess

    @property
    def spec(self) -> VitSpec:
        """The sizes of the network."""
        return self.manifest.spec

    @cached_property
    def golden(self) -> dict[str, Array]:
        """``inputs`` (8, C, h, w), ``reference`` and ``outputs.<target>`` (8, classes), and ``tolerance.<target>``."""
        try:
            with np.load(inside(self.root, "golden.npz"), allow_pickle=False) as data:
                found = {name: data[name] for name in data.files}
        except (*BROKEN_ZIP, KeyError, MemoryError) as error:
            raise BundleError(
                f"{self.root}: golden.npz must be readable, got {error}.", hint="Copy the bundle again."
            ) from None
        if problem := _golden_problem(found, self.spec):
            raise BundleError(f"{self.root}: golden.npz must hold {problem}.", hint="Make the bundle again.")
        return found

    @cached_property
    def calibrated_on(self) -> frozenset[str]:
        """Content hashes (`calibration.data.ImageSet.content_hashes`) of the calibration images; empty where none are listed."""
        listed = CALIBRATED_ON in self.manifest.files
        return frozenset(
            inside(self.root, CALIBRATED_ON).read_bytes().decode(errors="replace").split() if listed else ()
        )

    @cached_property
    def default_target(self) -> str:
        """The first target of the bundle whose runtime is installed here, else its first target."""
        names = [n for n, entry in self.manifest.targets.items() if entry.settings.get("stage") != "plan"]
        runnable = (n for n in names if n in targets.names() and _runs(n))
        return next(runnable, (names or list(self.manifest.targets))[0])

    def artifact(self, target: str) -> Artifact:
        """The artifact of `target`, with absolute paths."""
        if target not in self.manifest.targets:
            raise unknown_name(f"{self.root}: target", target, self.manifest.targets)
        return artifact_of(target, self.manifest.targets[target], self.root)

    def session(self, target: str | None = None, threads: int = 1) -> Session:
        """An open session of `target` (default: `default_target`); opened once per target and thread count."""
        name = target or self.default_target
        key = (name, threads)
        if key not in self._sessions:
            artifact = self.artifact(name)  # names a wrong target before the runtime is looked for
            self._sessions[key] = targets.get(name).open(artifact, threads=threads)
        return self._sessions[key]

    def logits(self, pixels: Array, target: str | None = None, *, threads: int = 1) -> Array:
        """(B, C, h, w) preprocessed float32 -> (B, classes)."""
        artifact = self.artifact(target or self.default_target)
        outputs = self.session(target, threads).run({artifact.inputs[0].name: np.ascontiguousarray(pixels, np.float32)})
        return outputs[artifact.outputs[0].name]

    def predict(self, image: str | Path | Image.Image | Array, target: str | None = None, *, threads: int = 1) -> Array:
        """Class probabilities (classes,) of one image: a path, a PIL image, uint8 (H, W, C), or preprocessed float (C, h, w)."""
        if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
            pixels = image
        elif isinstance(image, str | Path):
            from calibration.data import read_image

            pixels = apply(self.preprocess, read_image(Path(image)))
        else:
            pixels = apply(self.preprocess, image)
        logits = self.logits(pixels[None], target, threads=threads)[0].astype(np.float64)
        shifted = np.exp(logits - logits.max())
        probabilities: Array = shifted / shifted.sum()
        return probabilities

    def top(
        self, image: str | Path | Image.Image | Array, k: int = 5, target: str | None = None, *, threads: int = 1
    ) -> list[tuple[str, float]]:
        """The `k` most likely (label, probability) pairs."""
        p = self.predict(image, target, threads=threads)
        names = self.manifest.labels or [str(i) for i in range(len(p))]
        return [(names[i], float(p[i])) for i in np.argsort(-p)[:k]]

    def check(self, target: str) -> dict[str, Any]:
        """Golden inputs through `target` against the outputs recorded when the bundle was made.

        Returns:
            target, max_abs (the largest difference, None where an output is not finite), tolerance, passed.
        """
        expected = self.golden.get(f"outputs.{target}")
        if expected is None:
            raise BundleError(
                f"{self.root}: golden.npz must hold outputs of target {target!r}.", hint="Make the bundle again."
            )
        # One image at a time: a static-batch artifact takes no other, and a dynamic one is tested as it is used.
        got = np.concatenate([self.logits(x[None], target) for x in self.golden["inputs"]])
        worst = float(np.abs(got - expected).max()) if np.isfinite(got).all() else None
        recorded = self.golden.get(f"tolerance.{target}")
        limit = tolerance(expected, self.manifest.targets[target].precision) if recorded is None else float(recorded)
        return {"target": target, "max_abs": worst, "tolerance": limit, "passed": worst is not None and worst <= limit}
