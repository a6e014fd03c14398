"""`calibration.image` on good, odd and hostile files, written by Pillow and then damaged by hand."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from calibration import image as image_module
from calibration.image import read_image
from calibration.preprocess import apply
from compressor.errors import DataError
from compressor.types import Preprocess
from tests.core.pictures import memory, picture, save

RGB = Preprocess((16, 16))
GRAY = Preprocess((16, 16), mean=(0.5,), std=(0.5,), channels="L")


def file_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000"])
def test_lossless_formats_give_the_pixels_back(tmp_path, kind):
    image = picture().quantize(64).convert("RGB")  # at most 64 colours: GIF keeps them all
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "x.img"
    path.write_bytes(file_bytes(image, kind, **options))
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path, kind, share):
    image_module.Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    data = file_bytes(picture(height=64, width=64), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data)
    assert read_image(path).size == (64, 64)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"cut.img': must be ") as caught:
        read_image(path)
    assert "\n" not in str(caught.value) and caught.value.hint
    if share == 0.0:
        assert "got an empty file" in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, kind):
    """Random damage either still decodes or is a DataError that names the file; no other exception, no warning."""
    rng = np.random.default_rng(7)
    data = file_bytes(picture(), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    path, refused, read = tmp_path / "bad.img", 0, 0
    path.write_bytes(data)
    assert read_image(path).size == (24, 20)
    for _ in range(60):
        broken = np.frombuffer(data, np.uint8).copy()
        reach = len(broken) if rng.random() < 0.5 else min(len(broken), 80)  # half of the time the header
        broken[rng.integers(0, reach, 6)] = rng.integers(0, 256, 6)
        path.write_bytes(broken.tobytes())
        try:
            read += read_image(path).mode in ("L", "RGB")
        except DataError as error:
            assert "bad.img" in str(error)
            refused += 1
    assert refused > 0 and refused + read == 60


@pytest.mark.parametrize(
    "content", [b"hello, this is text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\0" * 5000]
)
def test_files_that_are_no_image_are_refused(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x.png': must be one of JPEG, .* got something else"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "found"), [("gone.png", "none"), ("folder", "a folder or a device"), ("pipe", "a folder or a device")]
)
def test_paths_that_are_no_file_are_refused(tmp_path, name, found):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(DataError, match=f"{name}': must be an image file, found {found}"):
        read_image(tmp_path / name)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(height=16, width=32)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / f"{orientation}.png", image, exif=exif)
        with Image.open(path) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored))  # Pillow's own implementation
            assert orientation == 1 or not np.array_equal(expected, np.asarray(image))
        np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


def test_senseless_exif_is_no_reason_to_refuse(tmp_path):
    image = picture(height=16, width=32)
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(np.asarray(read_image(save(tmp_path / "a.png", image, exif=exif))), np.asarray(image))
    data = bytearray(file_bytes(image, "JPEG", exif=exif))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 8] = b"\xff" * 8
    (tmp_path / "b.jpg").write_bytes(data)
    assert read_image(tmp_path / "b.jpg").size == (32, 16)


def test_modes_of_files(tmp_path):
    """What each kind of file is read as; the pixel rules are tested with `to_channels`."""
    rgb, gray = picture(), picture(channels=1)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    cases = {
        "gray.png": (gray, "L", np.asarray(gray)),
        "deep.png": (deep, "L", np.asarray(gray)),
        "deep.tif": (deep, "L", np.asarray(gray)),
        "bits.png": (gray.convert("1"), "L", np.asarray(gray.convert("1")) * np.uint8(255)),
        "la.png": (gray.convert("LA"), "L", np.asarray(gray)),
        "rgba.png": (rgb.convert("RGBA"), "RGB", np.asarray(rgb)),
        "cmyk.tif": (rgb.convert("CMYK"), "RGB", np.asarray(rgb)),
        "palette.png": (rgb.quantize(16), "RGB", np.asarray(rgb.quantize(16).convert("RGB"))),
    }
    for name, (image, mode, expected) in cases.items():
        got = read_image(save(tmp_path / name, image))
        assert got.mode == mode, name
        np.testing.assert_array_equal(np.asarray(got), expected, err_msg=name)
        assert apply(RGB, got).shape == (3, 16, 16) and apply(GRAY, got).shape == (1, 16, 16)


def test_cmyk_jpeg_and_palette_with_transparency(tmp_path):
    red = Image.new("RGB", (20, 20), (250, 10, 10))
    pixels = np.asarray(read_image(save(tmp_path / "a.jpg", red.convert("CMYK"), quality=95)))
    assert np.abs(pixels.astype(int) - (250, 10, 10)).max() < 12  # JPEG loss; an inverted CMYK would be far off
    palette = red.quantize(4)
    palette.info["transparency"] = bytes(
        [0, 128, 255, 255]
    )  # Pillow warns when it is converted directly; warnings fail
    np.testing.assert_array_equal(np.asarray(read_image(save(tmp_path / "b.png", palette))), np.asarray(red))


def test_float_tiff_is_refused_by_name(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f.tif': pixels must be integers, got floating point"):
        read_image(tmp_path / "f.tif")


def test_first_frame_of_an_animation(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(tmp_path / "a.gif", red, save_all=True, append_images=[blue])
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)


def png_claiming(width: int, height: int) -> bytes:
    """A valid PNG header of that size, with data for one pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("side", "got"), [(10_000, "10000 x 10000"), (60_000, "more than 178956970")])
def test_decompression_bomb_is_refused_before_decoding(tmp_path, side, got):
    (tmp_path / "bomb.png").write_bytes(png_claiming(side, side))
    read_image(save(tmp_path / "warm_up.png"))
    with memory() as peak, pytest.raises(DataError, match=rf"bomb.png': must have at most 89478485 pixels, got {got}"):
        read_image(tmp_path / "bomb.png")
    assert peak[0] < 1e6


def test_large_jpeg_is_decoded_at_half_size(tmp_path, monkeypatch):
    image = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    path = save(tmp_path / "large.jpg", image, quality=95)
    whole = apply(RGB, read_image(path))
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100_000)
    half = read_image(path)
    assert half.size == (200, 150)
    assert np.abs(apply(RGB, half) - whole).max() < 0.1  # about 5 of 255 levels: the same picture
    monkeypatch.setattr(image_module, "MAX_PIXELS", 20_000)
    with pytest.raises(DataError, match=r"large.jpg': must have at most 20000 pixels, got 400 x 300"):
        read_image(path)
