"""Reading weight files without executing anything in them.

Names and shapes are known before any number is read, so a damaged or hostile file is refused by its table of contents.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.documents import read_json
from compressor.errors import CheckpointError
from compressor.types import Array

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Tensors", "from_state_dict", "read_weights"]

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
NESTED = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights
WRAPPERS = ("module.", "_orig_mod.", "timm_model.", "model.")  # left on every name by wrapping modules, which nest
LFS_POINTER = b"version https://git-lfs"

Reader = Callable[[], "Tensor"]


@dataclass(frozen=True)
class Tensors:
    """A weight file's table of contents, and the way to read one tensor of it.

    Attributes:
        where: the file or folder, for messages.
        shapes: name -> shape, in the file's order.
        read: name -> float32 array of that shape, finite, owning its memory.
        sha256: of the file; of the files' digests in name order when there are several.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Array]
    sha256: str

    @property
    def params(self) -> int:
        """Numbers in the file, as its authors count parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_weights(path: Path) -> Tensors:
    """The weights in a file, or in a folder that holds ``model.safetensors`` or ``pytorch_model.bin``, sharded or not.

    Raises:
        CheckpointError: nothing is there, the file is damaged, or it holds more than tensors.
    """
    files = _weight_files(path) if path.is_dir() else [path]
    readers: dict[str, tuple[tuple[int, ...], Reader]] = {}
    for file in files:
        found = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        for name in readers.keys() & found.keys():
            raise CheckpointError(f"{file}: tensor {name!r} must be in one shard only, got a second one.")
        readers |= found
    digests = [_sha256(file) for file in files]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return _tensors(str(path), readers, digest)


def from_state_dict(state: Mapping[str, Any], where: str) -> Tensors:
    """The weights of a state dict in memory; the digest covers names, shapes and bytes.

    Raises:
        CheckpointError: there is no tensor in it.
    """
    readers = _state_dict(state, where)
    digest = hashlib.sha256()
    for name, (shape, reader) in sorted(readers.items()):
        digest.update(f"{name}{shape}".encode())
        digest.update(_float32(reader(), name, where).tobytes())
    return _tensors(where, readers, digest.hexdigest())


def _tensors(where: str, readers: Mapping[str, tuple[tuple[int, ...], Reader]], sha256: str) -> Tensors:
    names = {name: name for name in readers}
    while names and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in names)), "")):
        names = {name.removeprefix(wrapper): full for name, full in names.items()}

    def read(name: str) -> Array:
        return _float32(readers[names[name]][1](), name, where)

    return Tensors(where, {name: readers[full][0] for name, full in names.items()}, read, sha256)


def _weight_files(folder: Path) -> list[Path]:
    for name in FOLDER_FILES:
        path = folder / name
        if path.is_file():
            return _shards(path) if name.endswith(".json") else [path]
    raise CheckpointError(f"{folder}: the folder must hold one of {', '.join(FOLDER_FILES)}, got none of them.")


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of file names, got {type(table).__name__}.")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: every shard must be a file of this folder, got {name!r}.")
    return [index.parent / name for name in names]


def _safetensors(path: Path) -> dict[str, tuple[tuple[int, ...], Reader]]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), "pt")
        return {name: (tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: the file must be a complete safetensors file, got {error}.", hint=_damaged_hint(path)
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: the file must be readable, got {error}.") from None


def _pickled(path: Path) -> dict[str, tuple[tuple[int, ...], Reader]]:
    import torch

    if path.suffix not in PICKLED:
        raise CheckpointError(
            f"{path}: the name must end in .safetensors or {', '.join(PICKLED)}, got {path.suffix!r}."
        )
    _refuse_compressed(path)
    try:
        # Only tensors, containers and the options object of training scripts (plain attributes) are built.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what is wrong with the file is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - hostile bytes can raise anything, and all of it means the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        code = "weights_only" in str(error) or "Unsupported" in str(error) or "WeightsUnpickler" in str(error)
        what = (
            "tensors only, got Python objects, which are never executed" if code else f"a complete file, got: {reason}"
        )
        hint = (
            "Save it again with safetensors.torch.save_file(model.state_dict(), ...)." if code else _damaged_hint(path)
        )
        raise CheckpointError(f"{path}: the file must hold {what}.", hint=hint) from None
    return _state_dict(content, str(path))


def _refuse_compressed(path: Path) -> None:
    try:
        entries = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # torch says better what is wrong
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: tensors must be stored uncompressed, as torch.save does, got a compressed archive."
        )


def _state_dict(content: Any, where: str) -> dict[str, tuple[tuple[int, ...], Reader]]:
    import torch

    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: the file must hold a state dict, got {type(content).__name__}.")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{where}: the state dict must hold tensors, got none.")
    return {str(name): (tuple(value.shape), partial(_itself, value)) for name, value in tensors.items()}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _float32(tensor: Tensor, name: str, where: str) -> Array:
    import torch

    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if tensor.dtype not in floats or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: tensor {name!r} must be float16, bfloat16, float32 or float64, got {kind}.",
            hint="Save the float model, before any quantization.",
        )
    if tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{where}: tensor {name!r} must hold as many numbers as its shape says.")
    array: Array = tensor.detach().to(torch.float32, copy=True).contiguous().numpy()
    if not torch.isfinite(torch.from_numpy(array)).all():
        raise CheckpointError(
            f"{where}: tensor {name!r} must be finite in float32, got NaN or infinity.",
            hint="The checkpoint is damaged or its training diverged; use an earlier one.",
        )
    return array


def _damaged_hint(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "This is a git-lfs pointer, not the weights; run 'git lfs pull'."
    return "It is damaged or was not fetched completely; fetch it again."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
