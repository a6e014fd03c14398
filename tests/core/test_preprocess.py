"""`calibration.preprocess` against timm's and transformers' own transforms, and against itself on its two paths."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from subprocess import run

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.preprocess import apply, resized_shape, to_channels
from compressor.errors import DataError
from compressor.types import Preprocess
from tests import peers

IMAGENET = Preprocess((224, 224), crop=0.875)
FASHION = Preprocess((28, 28), mean=(0.2858,), std=(0.3529,), channels="L")


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Smooth structure plus noise, so that a wrong filter or a crop that is one pixel off shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (5 + 3 * c) + y / (9 - 2 * c)) for c in range(channels)]
    pixels = np.clip(np.stack(waves, axis=2) + rng.normal(0, 20, (height, width, channels)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def by_timm(contract: Preprocess, image: Image.Image) -> np.ndarray:
    peers.import_timm()
    from timm.data import create_transform

    transform = create_transform(
        (len(contract.mean), *contract.size),
        crop_pct=contract.crop,
        interpolation=contract.interpolation,
        mean=contract.mean,
        std=contract.std,
    )
    return transform(image.convert(contract.channels)).numpy()


# Smaller and larger than the target, odd and even margins on both sides, already the right size, extreme shapes.
SIZES = [
    (300, 501),
    (501, 300),
    (375, 500),
    (224, 224),
    (256, 256),
    (257, 256),
    (97, 131),
    (640, 227),
    (1, 40),
    (333, 777),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0])
def test_apply_shorter_is_timm(interpolation, crop):
    contract = replace(IMAGENET, crop=crop, interpolation=interpolation)
    for seed, (height, width) in enumerate(SIZES):
        image = photo(height, width, seed=seed)
        ours, theirs = apply(contract, image), by_timm(contract, image)
        # The same float32 operations in the same order on the same integers: equal, not merely close.
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{height} x {width}")


@pytest.mark.parametrize("size", [(28, 28), (27, 27), (32, 48), (61, 40), (518, 518)])
def test_apply_other_target_sizes_are_timm(size):
    contract = replace(IMAGENET, size=size, crop=0.9)
    for height, width in [(99, 140), (140, 99), (333, 777), (61, 40)]:
        image = photo(height, width)
        np.testing.assert_array_equal(apply(contract, image), by_timm(contract, image), err_msg=f"{height} x {width}")


def test_comparison_with_timm_can_fail():
    image = photo(301, 500)
    theirs = by_timm(IMAGENET, image)
    shifted = np.roll(theirs, 1, axis=2)
    for wrong in (
        replace(IMAGENET, interpolation="bilinear"),
        replace(IMAGENET, crop=0.9),
        replace(IMAGENET, resize="exact"),
    ):
        assert np.abs(apply(wrong, image) - theirs).max() > 0.1
    assert np.abs(apply(IMAGENET, image) - shifted).max() > 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([0.8, 0.875, 0.9, 0.95, 1.0]))
def test_shorter_always_covers_the_crop(height, width, crop):
    """No image shape makes the resize smaller than the crop, so nothing is ever padded."""
    for size in [(224, 224), (32, 48), (7, 5)]:
        rows, cols = resized_shape(replace(IMAGENET, size=size, crop=crop), height, width)
        assert rows >= size[0] and cols >= size[1]


def by_transformers(contract: Preprocess, image: Image.Image) -> np.ndarray:
    peers.import_transformers()
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    height, width = contract.size
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        resample=Image.Resampling[contract.interpolation.upper()],
        image_mean=list(contract.mean),
        image_std=list(contract.std),
    )
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def test_apply_exact_is_transformers():
    contract = replace(IMAGENET, crop=1.0, resize="exact", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    for size in [(224, 224), (196, 252)]:
        for height, width in SIZES:
            image, now = photo(height, width), replace(contract, size=size)
            # transformers multiplies by 1/255 where we divide by 255: one more rounding, doubled by 1/std.
            np.testing.assert_allclose(apply(now, image), by_transformers(now, image), atol=1e-6, rtol=0)


def test_comparison_with_transformers_can_fail():
    contract = replace(IMAGENET, crop=1.0, resize="exact", mean=(0.5,) * 3, std=(0.5,) * 3)
    image = photo(301, 500)
    assert np.abs(apply(replace(contract, resize="shorter"), image) - by_transformers(contract, image)).max() > 0.1


def test_apply_exact_with_crop_is_the_deit_processor_of_transformers():
    peers.import_transformers()
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

    contract = replace(IMAGENET, resize="exact", mean=(0.5,) * 3, std=(0.5,) * 3)  # 224 / 0.875: 256, then the crop
    for height, width in SIZES:
        image = photo(height, width)
        theirs = np.asarray(DeiTImageProcessorPil()(image, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(apply(contract, image), theirs, atol=1e-6, rtol=0)  # 1/255 as above
        assert np.abs(apply(replace(contract, crop=1.0), image) - theirs).max() > 0.1


# --------------------------------------------------------------------------- the fast path


def slow(contract: Preprocess, array: np.ndarray) -> np.ndarray:
    """Through Pillow, whatever the size."""
    return apply(contract, Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array))


@pytest.mark.parametrize("resize", ["shorter", "exact"])
@pytest.mark.parametrize("channels", [1, 3])
def test_array_of_right_size_is_the_slow_path_bit_for_bit(resize, channels):
    rng = np.random.default_rng(0)
    contract = replace(FASHION, resize=resize) if channels == 1 else Preprocess((28, 28), resize=resize)
    for _ in range(20):
        array = rng.integers(0, 256, (28, 28, channels), np.uint8)
        fast = apply(contract, array)
        assert fast.dtype == np.float32 and fast.flags.c_contiguous
        assert fast.tobytes() == slow(contract, array).tobytes()


def test_array_is_never_taken_as_ready_when_it_is_not():
    """Right size but a crop below 1, another size, other channels: all must go through Pillow."""
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (28, 28, 1), np.uint8)
    cropped = replace(FASHION, crop=0.875)
    assert not np.array_equal(apply(cropped, array), apply(FASHION, array))
    np.testing.assert_array_equal(apply(cropped, array), slow(cropped, array))
    larger = rng.integers(0, 256, (28, 30, 1), np.uint8)
    np.testing.assert_array_equal(apply(FASHION, larger), slow(FASHION, larger))
    colour = rng.integers(0, 256, (28, 28, 3), np.uint8)
    np.testing.assert_array_equal(apply(FASHION, colour), slow(FASHION, colour))
    assert apply(Preprocess((28, 28)), array).shape == (3, 28, 28)


def test_apply_leaves_its_argument_alone_and_takes_two_axes():
    array = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    before = array.copy()
    two, three = apply(FASHION, array), apply(FASHION, array[:, :, None])
    np.testing.assert_array_equal(two, three)
    np.testing.assert_array_equal(array, before)


# --------------------------------------------------------------------------- colour modes


def test_gray_becomes_three_equal_channels():
    gray = photo(40, 40, channels=1)
    pixels = np.asarray(to_channels(gray, "RGB"))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[:, :, channel], np.asarray(gray))


def test_colour_becomes_luma():
    image = photo(40, 50)
    r, g, b = (np.asarray(image)[:, :, c].astype(float) for c in range(3))
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    # Pillow's weights are 16-bit integers: half a level of rounding and a little of the weights.
    assert np.abs(np.asarray(to_channels(image, "L")) - luma).max() < 0.51
    assert np.abs(np.asarray(to_channels(image, "L")) - (r + g + b) / 3).max() > 5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa", "LAB"])
@pytest.mark.parametrize("channels", ["RGB", "L"])
def test_every_mode_of_pillow_is_converted(mode, channels):
    image = photo(30, 30).convert("RGBA" if mode in ("PA", "RGBa") else "RGB").convert(mode)
    out = to_channels(image, channels)
    assert out.mode == channels and out.size == (30, 30)
    assert np.asarray(out).std() > 1  # something of the picture is left


def test_alpha_is_dropped_as_by_timm():
    rgba = photo(30, 30, channels=4)
    np.testing.assert_array_equal(np.asarray(to_channels(rgba, "RGB")), np.asarray(rgba)[:, :, :3])


@pytest.mark.parametrize("dtype", [np.uint16, np.dtype(">u2"), np.int32])
def test_16_bit_gray_is_scaled_and_not_clipped(dtype):
    values = np.arange(65536).reshape(256, 256)
    image = Image.fromarray(values.astype(dtype))
    assert image.mode != "L"
    expected = np.rint(values * (255 / 65535))
    np.testing.assert_array_equal(np.asarray(to_channels(image, "L")), expected)
    assert np.asarray(image.convert("L")).mean() > 200  # Pillow alone clips: nearly everything becomes white


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4), np.float32), "pixels must be integers, got floating point"),
        (np.full((4, 4), 70000, np.int32), r"must lie in 0..65535, got 70000..70000"),
        (np.full((4, 4), -1, np.int32), r"must lie in 0..65535, got -1..-1"),
    ],
)
def test_modes_without_a_range_are_refused(pixels, message):
    with pytest.raises(DataError, match=message):
        apply(FASHION, Image.fromarray(pixels))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((28, 28), np.float32),
        np.zeros((2, 3, 28, 28), np.uint8),
        np.zeros((3, 28, 28), np.uint8),
        np.zeros((0, 28, 1), np.uint8),
    ],
)
def test_arrays_that_are_no_image_are_refused(array):
    with pytest.raises(DataError, match=rf"must be uint8 of shape .* got {array.dtype}"):
        apply(FASHION, array)


def test_a_strip_is_refused_before_it_fills_the_memory():
    with pytest.raises(DataError, match="at most 100 times the shorter, got 60000 x 1 pixels"):
        apply(IMAGENET, np.zeros((1, 60000, 3), np.uint8))
    assert apply(IMAGENET, np.zeros((2, 200, 3), np.uint8)).shape == (3, 224, 224)  # exactly 100 times is taken


def test_normalisation_is_the_definition():
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    contract = Preprocess((16, 16), mean=(0.25,), std=(0.5,), channels="L")
    expected = (array[:, :, 0] / 255.0 - 0.25) / 0.5
    np.testing.assert_allclose(apply(contract, array)[0], expected, atol=1e-6)  # float32 rounding of numbers up to 2
    assert math.isclose(float(apply(contract, array).max()), 1.5, abs_tol=1e-6)


def test_imports_no_torch():
    code = "import sys, calibration.preprocess, calibration.data; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
    assert run([sys.executable, "-c", code.replace("torch", "numpy")], check=False).returncode == 1
