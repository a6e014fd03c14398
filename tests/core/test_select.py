"""Selection of calibration images: each selector by its defining property, and fingerprints that refuse what they must."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.fingerprint import Fingerprint, as_json, fingerprint, matched, read_fingerprint
from calibration.select import Features, coarse_to_fine, features, k_centre, random
from compressor.errors import ConfigError, DataError
from compressor.types import BlockSpec, VitSpec
from compressor.vit import build

SPEC = VitSpec((8, 8), (4, 4), 1, 6, (BlockSpec(2, 3, 3, 10), BlockSpec(2, 3, 3, 10)), num_classes=3)
MODEL = "0" * 64


def pool(sizes: tuple[int, ...], seed: int = 0, spread: float = 0.2) -> tuple[Features, np.ndarray]:
    """Gaussian blobs far apart, and the blob of each image."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(len(sizes)), sizes)
    centres = 5 * np.eye(max(len(sizes), 4))[: len(sizes)]
    x = centres[label] + spread * rng.standard_normal((len(label), centres.shape[1]))
    return Features(x, rng.standard_normal((len(label), 8))), label


def generator() -> np.random.Generator:
    return np.random.default_rng(7)


# matched needs a fingerprint of pools with 4 columns; its own tests are below
SELECTORS = [random, k_centre, coarse_to_fine, matched(fingerprint(pool((9, 9))[0], MODEL, 2, generator()))]


@pytest.mark.parametrize("select", SELECTORS)
@given(count=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_selectors_give_distinct_sorted_indices_and_repeat(select, count, seed):
    images, _ = pool((8, 7, 5), seed)
    got = select(images, count, np.random.default_rng(seed))
    assert got.tolist() == sorted(set(got.tolist()))
    assert len(got) == count
    assert 0 <= got.min() <= got.max() < len(images)
    assert np.array_equal(got, select(images, count, np.random.default_rng(seed)))


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize("count", [0, 21])
def test_selectors_refuse_a_count_outside_the_pool(select, count):
    with pytest.raises(ConfigError, match=rf"calib_size must be 1 to 20.*got {count}"):
        select(pool((8, 7, 5))[0], count, generator())


def test_k_centre_covers_rare_images_which_random_misses():
    images, label = pool((95, 3, 2))
    assert set(label[k_centre(images, 3, generator())]) == {0, 1, 2}
    assert set(label[random(images, 3, generator())]) == {0}  # negative control


def test_coarse_to_fine_drops_impure_images_and_keeps_proportions():
    images, label = pool((60, 30, 10))
    outliers = [3, 64, 95]
    images.activity[outliers] += 50 * np.arange(1, 4)[:, None] * np.random.default_rng(1).standard_normal((3, 8))
    got = coarse_to_fine(images, 10, generator())
    assert not set(got) & set(outliers)
    assert np.abs(np.bincount(label[got], minlength=3) - [6, 3, 1]).max() <= 1


def test_matched_selection_follows_the_device_not_the_pool():
    device, _ = pool((10, 40, 50), seed=1)
    images, label = pool((300, 300, 300), seed=2)
    mixture = fingerprint(device, MODEL, 3, generator())
    got = np.bincount(label[matched(mixture)(images, 60, generator())], minlength=3)
    assert np.abs(got - [6, 24, 30]).max() <= 1
    spread = images.embedding[matched(mixture)(images, 60, generator())].std(0)
    assert spread.min() > 0  # drawn points keep a component's width, its centre alone would not
    assert np.abs(np.bincount(label[random(images, 60, generator())], minlength=3) - [6, 24, 30]).max() > 5


def test_fingerprint_survives_its_file(tmp_path):
    mixture = fingerprint(pool((10, 20))[0], MODEL, 2, generator())
    (tmp_path / "device.json").write_text(as_json(mixture))
    again = read_fingerprint(tmp_path / "device.json", MODEL)
    assert np.allclose(again.weights, mixture.weights, atol=1e-6)  # float32 in the file
    assert np.allclose(again.means, mixture.means, atol=1e-5)
    assert again.images == 30
    values = np.concatenate(
        [
            np.ravel(v)
            for k, v in json.loads((tmp_path / "device.json").read_text()).items()
            if k in ("weights", "means", "variances")
        ]
    )
    assert len(values) == 2 + 2 * 4 + 2 * 4  # nothing but the mixture leaves the device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "1" * 64}, r"must be made with this model \(000000000000\), got one of model 111111111111"),
        ({"schema": 9}, r"fingerprint of schema 1"),
        ({"variances": [[0.0] * 4] * 2}, "positive variances"),
        ({"means": [[0.0] * 3] * 2}, "damaged"),
        ({"means": "x"}, "must be a fingerprint file"),
        ({"weights": [float("nan"), 1.0]}, "damaged"),
        ({"weights": [0.0, 0.0]}, "damaged"),
        ({"weights": [0.5, 2.0]}, "damaged"),
        ({"weights": [10**400, 1]}, "must be a fingerprint file, got something else"),
        ({"images": float("inf")}, "must be a fingerprint file, got something else"),
    ],
)
def test_damaged_fingerprints_are_refused(tmp_path, change, message):
    path = tmp_path / "device.json"
    content = json.loads(as_json(fingerprint(pool((10, 20))[0], MODEL, 2, generator())))
    path.write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=message):
        read_fingerprint(path, MODEL)


def test_a_file_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="must be a fingerprint file, got something else"):
        read_fingerprint(tmp_path / "deep.json", MODEL)


def test_a_fingerprint_of_one_image_is_refused():
    one = pool((1,))[0]
    with pytest.raises(DataError, match="at least two images, got 1"):
        fingerprint(one, MODEL, 1, generator())
    assert fingerprint(pool((2,))[0], MODEL, 1, generator()).images == 2  # the control


def test_missing_file_wrong_width_and_too_many_components_are_refused(tmp_path):
    with pytest.raises(DataError, match="must be a fingerprint file, got No such file"):
        read_fingerprint(tmp_path / "none.json", MODEL)
    narrow = Fingerprint(np.ones(1), np.zeros((1, 2)), np.ones((1, 2)), MODEL, 1)
    with pytest.raises(DataError, match="must have width 4 of this model, got 2"):
        matched(narrow)(pool((5, 5))[0], 2, generator())
    with pytest.raises(ConfigError, match=r"components must be 1 to 10.*got 11"):
        fingerprint(pool((5, 5))[0], MODEL, 11, generator())


def test_features_are_those_of_each_image_alone():
    torch.manual_seed(0)
    module = build(SPEC).requires_grad_(False)
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    together = features(module, [images[:3], images[3:]])
    assert together.embedding.shape == (5, 6)
    assert together.activity.shape == (5, 2 * 4 * 4)
    alone = features(module, [images[3:4]])
    # float32 sums in another order
    assert np.allclose(alone.embedding, together.embedding[3], atol=1e-5)
    assert np.allclose(alone.activity, together.activity[3], atol=1e-5)
    x = module.blocks[0].norm1(module.embed(torch.from_numpy(images[3:4])))
    assert together.activity[3, 0] == pytest.approx(x.mean().item(), abs=1e-5)
    assert together.activity[3, 2] == pytest.approx(x.abs().max().item(), abs=1e-5)
    with pytest.raises(DataError, match="at least one image"):
        features(module, [])
