"""One image file, decoded: out comes an upright 8-bit image, or one sentence that names the file."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from calibration.preprocess import is_gray, to_channels
from compressor.errors import DataError

__all__ = ["DECODE_ERRORS", "SUFFIXES", "about", "read_image"]

# Only formats that Pillow decodes itself: EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 89_478_485  # Pillow's own warning limit, a quarter GiB of RGB
DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, RuntimeError),
    *(MemoryError, struct.error, zlib.error),
)  # what Pillow and NumPy raise on damaged files
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def about(name: object) -> Iterator[None]:
    """A DataError raised inside gets `name` in front of it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{str(name)!r}: {error}", hint=error.hint) from None


def read_image(path: Path) -> Image.Image:
    """One image file in mode L (gray) or RGB, turned upright by its EXIF orientation; the first frame of several.

    A JPEG over 89 megapixels is decoded at half its size; any other image that large is refused before it is decoded.

    Raises:
        DataError: not a file, not an image, damaged, truncated or too large; the text names the file.

    Deviation: timm and torchvision ignore the EXIF orientation, so that a photo from a phone can reach the network
    lying on its side; here it never does.
    """
    with about(path):
        if not path.is_file():
            found = "a folder or a device" if path.exists() else "none"
            raise DataError(f"must be an image file, found {found}.", hint="Check the path.")
        Image.init()  # a Pillow built without AVIF, say, must not be asked for it
        formats = [name for name in FORMATS if name in Image.OPEN]
        try:
            with warnings.catch_warnings(), path.open("rb") as file:
                warnings.simplefilter("ignore")  # Pillow's remarks on sizes and metadata; sizes are judged here
                with Image.open(file, formats=formats) as image:
                    _limit_size(image)
                    image.load()
                    return to_channels(_upright(image), "L" if is_gray(image) else "RGB")
        except Image.DecompressionBombError:
            raise _too_large(f"more than {2 * MAX_PIXELS}") from None
        except PermissionError as error:
            raise DataError(f"must be readable, got: {error.strerror}.", hint="Check its permissions.") from None
        except UnidentifiedImageError:
            what = "an empty file" if path.stat().st_size == 0 else "something else or a damaged file"
            raise DataError(f"must be one of {', '.join(formats)}, got {what}.", hint="Remove or replace it.") from None
        except DECODE_ERRORS as error:
            raise DataError(f"must be an undamaged image, got: {error}.", hint="Remove or replace it.") from None


def _limit_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.draft(None, (width // 2, height // 2))  # JPEG decodes at half size; other formats do nothing here
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{width} x {height}")


def _too_large(pixels: str) -> DataError:
    return DataError(f"must have at most {MAX_PIXELS} pixels, got {pixels}.", hint="Scale it down.")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; an EXIF block that cannot be read says nothing."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except DECODE_ERRORS:
        orientation = None
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
