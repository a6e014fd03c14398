"""A model from whatever a user names: a checkpoint, or a bundle, as a folder or a .zip."""

from __future__ import annotations

from compressor import checkpoint
from compressor.bundle import Bundle, is_bundle
from compressor.errors import UnsupportedModel
from compressor.types import Model, VitSpec

__all__ = ["load_model", "require_exportable"]

ONNX_BYTES = 2**31 - 2**20  # of one file, a protobuf message; a megabyte is left for the graph


def load_model(source: str, *, arch: str | None = None, image_size: int | None = None) -> Model:
    """`checkpoint.load`, and the float model inside a bundle, every file of which is checked first.

    Raises:
        BundleError: a bundle that is damaged or was changed.
        VitrimError: see `checkpoint.load`.
    """
    if not is_bundle(source):
        return checkpoint.load(source, arch=arch, image_size=image_size)
    with Bundle.open(source) as bundle:
        return checkpoint.load(str(bundle.root), arch=arch, image_size=image_size)


def require_exportable(spec: VitSpec) -> None:
    """Refuse, before any work, a network whose float graph no runtime could be given in one ONNX file.

    Raises:
        UnsupportedModel: its float32 weights take 2 GiB or more (ViT-Huge and beyond).
    """
    size = 4 * spec.params()
    if size > ONNX_BYTES:
        raise UnsupportedModel(
            f"The model's float32 weights must take less than 2 GiB, the most one ONNX file can hold, got {size / 2**30:.1f} GiB."
        )
