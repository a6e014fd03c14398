"""One image into the network's input, as timm and transformers do it: one code for calibration, evaluation and device.

Order: colour mode, resize (Pillow, antialiased), centre crop, 0..1, normalise. No torch, no torchvision.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image

from compressor.errors import DataError
from compressor.types import Array, Preprocess

__all__ = ["apply", "is_gray", "resized_shape", "to_channels"]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_ASPECT = 100  # a longer strip has nothing in its centre square, and resizing its shorter side could fill the memory
# Modes that Pillow converts only by another (a palette with transparency also warns on the direct way).
VIA = {"P": "RGBA", "PA": "RGBA", "La": "LA", "LAB": "RGB"}
GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


def apply(preprocess: Preprocess, image: Image.Image | Array) -> Array:
    """The network's input, float32 (C, h, w), of a PIL image of any mode or a uint8 array (H, W) or (H, W, 1 | 3 | 4).

    An array that already has the right size and channels skips Pillow; the result is the same bit for bit, since
    Pillow's resize to the same size is a copy.

    Raises:
        DataError: the array is no image, the mode has no defined range, or one side is over 100 times the other.

    Source: timm 1.0 ``create_transform`` (resize ``shorter``: floor(size / crop), torchvision's centre-crop rounding)
    and transformers 5 ``ViTImageProcessorPil``, ``DeiTImageProcessorPil`` (resize ``exact``). Deviations: they clip
    16-bit images, which are scaled here (see `to_channels`); transformers' torchvision backend rounds otherwise, by up
    to 3 of 255 levels.

    >>> gray = Preprocess((2, 2), mean=(0.5,), std=(0.5,), channels="L")
    >>> apply(gray, np.array([[0, 255], [255, 0]], np.uint8)).tolist()
    [[[-1.0, 1.0], [1.0, -1.0]]]
    """
    if isinstance(image, np.ndarray):
        array = _checked(image)
        if _ready(preprocess, array):
            return _normalise(preprocess, array)
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    resized = _resize(preprocess, to_channels(image, preprocess.channels))
    return _normalise(preprocess, np.atleast_3d(np.asarray(resized)))


def resized_shape(preprocess: Preprocess, height: int, width: int) -> tuple[int, int]:
    """Rows and columns after the resize, before the centre crop.

    A square target uses torchvision's rule (the longer side truncated), another one timm's (both sides rounded).

    >>> resized_shape(Preprocess((224, 224), crop=0.875), 300, 501)
    (256, 427)
    """
    rows, cols = (math.floor(side / preprocess.crop) for side in preprocess.size)
    if preprocess.resize == "exact":
        return rows, cols
    if rows == cols:
        longer = int(rows * max(height, width) / min(height, width))
        return (rows, longer) if height <= width else (longer, rows)
    ratio = min(height / rows, width / cols)
    return round(height / ratio), round(width / ratio)


def is_gray(image: Image.Image) -> bool:
    """Whether the image has one colour channel."""
    return image.mode in GRAY_MODES


def to_channels(image: Image.Image, channels: Literal["RGB", "L"]) -> Image.Image:
    """The image in mode RGB or L.

    Gray to RGB repeats the channel; colour to L is ITU-R 601 luma; alpha is dropped, as timm, torchvision and
    transformers do; CMYK is converted without a colour profile. 16-bit gray is scaled from 0..65535 to 0..255 and
    rounded, where Pillow alone would clip.

    Raises:
        DataError: floating point pixels, or 32-bit integers beyond 16 bits.
    """
    if image.mode == channels:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    elif image.mode == "F":
        raise DataError(
            "pixels must be integers, got floating point.", hint="Save the image with 8 or 16 bits per channel."
        )
    elif image.mode in VIA:
        image = image.convert(VIA[image.mode])
    return image.convert(channels)


def _from_16_bit(image: Image.Image) -> Image.Image:
    stored = np.asarray(image)
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high > 65535:
        hint = "Save the image with 8 or 16 bits per channel."
        raise DataError(f"pixels must lie in 0..65535, got {low}..{high}.", hint=hint)
    values = stored.astype(np.uint32)
    values += 128
    values //= 257  # round(v * 255 / 65535)
    return Image.fromarray(values.astype(np.uint8))


def _checked(array: Array) -> Array:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise DataError(
            f"image array must be uint8 of shape (H, W, 1 | 3 | 4), got {array.dtype} {array.shape}.",
            hint="Put the channels last, 0..255.",
        )
    return array


def _ready(preprocess: Preprocess, array: Array) -> bool:
    """Whether resize, crop and colour conversion would all change nothing."""
    rows, cols, channels = array.shape
    same_size = (rows, cols) == preprocess.size == resized_shape(preprocess, rows, cols)
    return same_size and channels == len(preprocess.mean)


def _resize(preprocess: Preprocess, image: Image.Image) -> Image.Image:
    """Resize and centre crop."""
    width, height = image.size
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise DataError(
            f"the longer side must be at most {MAX_ASPECT} times the shorter, got {width} x {height} pixels.",
            hint="Crop it.",
        )
    rows, cols = resized_shape(preprocess, height, width)
    image = image.resize((cols, rows), RESAMPLING[preprocess.interpolation])
    if (rows, cols) == preprocess.size:
        return image
    top, left = (round((have - want) / 2) for have, want in zip((rows, cols), preprocess.size, strict=True))
    return image.crop((left, top, left + preprocess.size[1], top + preprocess.size[0]))


def _normalise(preprocess: Preprocess, pixels: Array) -> Array:
    """uint8 (h, w, C) -> float32 (C, h, w); torchvision's operations in its order, so that the bits agree."""
    x = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    x /= np.float32(255)
    x -= np.asarray(preprocess.mean, np.float32)[:, None, None]
    x /= np.asarray(preprocess.std, np.float32)[:, None, None]
    return x
