"""`calibration.data`: folders, .npz, subsets, digests and batches; hostile ones are refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration import data
from calibration.data import ImageSet, batches, open_images, read_image, stratified
from calibration.preprocess import apply
from compressor.errors import ConfigError, DataError
from compressor.types import Preprocess
from tests.core.pictures import indexed_set, memory, picture, save

RGB = Preprocess((16, 16))
FASHION = Preprocess((28, 28), mean=(0.2858,), std=(0.3529,), channels="L", interpolation="bilinear")


@pytest.fixture
def class_folder(tmp_path):
    """Three classes of 4, 2 and 1 images."""
    for name, count in {"cat": 4, "ant": 2, "dog": 1}.items():
        for i in range(count):
            save(tmp_path / "set" / name / f"{name}{i}.png")
    return tmp_path / "set"


# --------------------------------------------------------------------------- the embedded sets


def test_demo_is_the_embedded_calibration_set():
    images = open_images("demo")
    assert len(images) == 500 and images.read(0).shape == (28, 28, 1)
    assert images.class_names == () and Counter(images.labels.tolist()) == dict.fromkeys(range(10), 50)
    assert images.names[:2] == ("calibration.npz[0]", "calibration.npz[1]")


def test_demo_eval_shares_no_image_with_demo():
    calibration, evaluation = open_images("demo"), open_images("demo:eval")
    assert len(evaluation) == 2000
    assert not set(calibration.content_hashes()) & set(evaluation.content_hashes())
    assert set(calibration.content_hashes()) & set(calibration.subset([3]).content_hashes())  # an overlap would be seen


def test_unknown_demo_is_refused_and_the_nearest_named():
    with pytest.raises(ConfigError, match=r"data must be one of demo, demo:eval, got 'demo:val'") as caught:
        open_images("demo:val")
    assert caught.value.hint == "Did you mean 'demo:eval'?"


# --------------------------------------------------------------------------- folders


def test_class_folders_are_sorted_labels(class_folder):
    images = open_images(str(class_folder))
    assert images.class_names == ("ant", "cat", "dog")
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1, 2] and images.labels.dtype == np.int64
    assert images.names[0] == "ant/ant0.png" and images.names[-1] == "dog/dog0.png"
    assert images.read(0).size == (24, 20)


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.jpg", "C.PNG", "d.webp"):
        save(tmp_path / name)
    images = open_images(str(tmp_path))
    assert images.labels is None and images.class_names == ()
    assert images.names == ("C.PNG", "a.jpg", "b.png", "d.webp")


def test_nested_class_folders_and_links_are_followed(class_folder):
    save(class_folder / "cat" / "deep" / "deeper" / "x.png")
    os.symlink(class_folder / "dog", class_folder / "eel")
    images = open_images(str(class_folder))
    assert "cat/deep/deeper/x.png" in images.names and "eel/dog0.png" in images.names
    assert images.class_names == ("ant", "cat", "dog", "eel")


def test_other_files_are_counted_and_left_alone(class_folder):
    (class_folder / "README.txt").write_text("hello")
    (class_folder / "ant" / "labels.csv").write_text("x")
    (class_folder / "ant" / "._ant0.png").write_bytes(b"resource fork")
    (class_folder / "ant" / "noextension").write_bytes(b"")
    save(class_folder / ".thumbnails" / "t.png")
    save(class_folder / "__MACOSX" / "t.png")
    images = open_images(str(class_folder))
    assert len(images) == 7 and images.ignored == 4
    assert images.class_names == ("ant", "cat", "dog")


def test_empty_class_folder_stays_a_class(class_folder):
    (class_folder / "bee").mkdir()
    images = open_images(str(class_folder))
    assert images.class_names == ("ant", "bee", "cat", "dog")
    assert images.labels.tolist() == [0, 0, 2, 2, 2, 2, 3]


def test_names_that_are_not_unicode_or_not_ascii_work(tmp_path):
    save(tmp_path / "кот" / "猫 фото\n.png")
    raw = os.fsencode(tmp_path / "кот") + b"/\xff\xfe.png"
    shutil.copy(tmp_path / "кот" / "猫 фото\n.png", raw)
    images = open_images(str(tmp_path))
    assert images.class_names == ("кот",) and len(images) == 2
    json.dumps(images.names).encode(), "".join(images.names).encode("utf-8")  # a lone surrogate would not encode
    assert next(batches(images, RGB, 2)).shape == (2, 3, 16, 16)
    Path(os.fsdecode(raw)).write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        list(batches(images, RGB, 2))
    assert str(caught.value).encode("utf-8") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "must hold at least one image, got none .0 other files"),
        (lambda d: (d / "notes.txt").write_text("x"), "must hold at least one image, got none .1 other files"),
        (lambda d: (d / "empty").mkdir(), "must hold at least one image"),
        (
            lambda d: (save(d / "a.png"), save(d / "x" / "b.png")),
            "class folders or images, got 1 images beside 1 folders",
        ),
        (lambda d: os.symlink(d / "gone.png", d / "link.png"), "link.png': must be a file, got a broken link"),
        (lambda d: os.symlink(d / "self.png", d / "self.png"), "self.png': must be a file, got a broken link"),
        (lambda d: os.mkfifo(d / "pipe.png"), "pipe.png': must be a file, got a broken link or a device"),
        (lambda d: (save(d / "x" / "a.png"), os.symlink(d, d / "x" / "up")), "x/up': a link must not lead back"),
        (lambda d: (save(d / "x" / "a.png"), os.symlink(d / "x", d / "x" / "y")), "x/y': a link must not lead back"),
    ],
)
def test_folders_that_make_no_set_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        open_images(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "image.png", "data.npy", ""])
def test_sources_that_are_neither_folder_nor_npz_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "image.png")
    np.save(tmp_path / "data.npy", np.zeros(3))
    found = "nothing there" if name == "nowhere" else ""
    if name == "":  # the empty path is the current folder, which holds an image
        assert len(open_images(name)) == 1
        return
    with pytest.raises(DataError, match=f"{name}: data must be a folder of images or an .npz file, found {found}"):
        open_images(name)


@pytest.fixture
def unprivileged():
    """A folder of our own as a user whom permissions bind."""
    folder = Path(tempfile.mkdtemp(prefix="vitrim-test-"))
    folder.chmod(0o755)
    save(folder / "x" / "a.png")
    read_image(folder / "x" / "a.png")  # load Pillow's plugins while every file can be read
    root = os.geteuid() == 0
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        (folder / "x").chmod(0o755)
        shutil.rmtree(folder)


def drop_privileges() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_unreadable_file_is_named(unprivileged):
    (unprivileged / "x" / "a.png").chmod(0)
    drop_privileges()
    images = open_images(str(unprivileged))
    with pytest.raises(DataError, match=r"x/a.png': must be readable, got: Permission denied"):
        images.read(0)
    with pytest.raises(DataError, match=r"x/a.png': must be readable"):
        images.digest()


def test_unreadable_folder_is_named(unprivileged):
    (unprivileged / "x").chmod(0)
    drop_privileges()
    with pytest.raises(DataError, match=r"x': must be readable, got: Permission denied"):
        open_images(str(unprivileged))


# --------------------------------------------------------------------------- npz


def test_npz_with_and_without_labels_and_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(5, dtype=np.uint8), other=np.zeros(3))
    images = open_images(str(tmp_path / "a.npz"))
    assert images.labels.tolist() == [0, 1, 2, 3, 4] and images.labels.dtype == np.int64
    np.testing.assert_array_equal(images.read(3), pixels[3])
    np.savez_compressed(tmp_path / "b.npz", images=pixels[..., 0])
    images = open_images(str(tmp_path / "b.npz"))
    assert images.labels is None and images.read(0).shape == (9, 7, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": np.zeros((2, 4, 4, 3), np.float32)},
            r"must be uint8 \(N, H, W, 1 \| 3 \| 4\), got float32 \(2, 4, 4, 3\)",
        ),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"got uint8 \(2, 3, 8, 8\)"),
        ({"images": np.zeros((4, 4), np.uint8)}, r"got uint8 \(4, 4\)"),
        ({"images": np.uint8(3)}, r"got uint8 \(\)"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, r"must hold at least one image, got shape \(0, 4, 4, 3\)"),
        ({"images": np.zeros((2, 0, 4, 3), np.uint8)}, r"got shape \(2, 0, 4, 3\)"),
        ({"pictures": np.zeros((2, 4, 4, 3), np.uint8)}, r"must hold an array 'images', got \['pictures.npy'\]"),
        ({"images": np.array([object()])}, "without objects"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)},
            r"labels must have shape \(2,\), got \(3,\)",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros((2, 1), int)},
            r"labels must have shape \(2,\), got \(2, 1\)",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)},
            "labels must be integers from 0, got float64",
        ),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "labels must be integers from 0"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**63], np.uint64)},
            "labels must be integers from 0, got uint64",
        ),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array(["a", "b"])}, "labels must be integers from 0"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([object()] * 2)}, "without objects"),
    ],
)
def test_npz_that_is_not_as_described_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=f"bad.npz'?: .*{message}"):
        open_images(str(tmp_path / "bad.npz"))


def test_npz_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    np.savez(tmp_path / "trap.npz", images=np.array([Trap()], dtype=object))
    with pytest.raises(DataError, match="without objects"):
        open_images(str(tmp_path / "trap.npz"))
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"undamaged .npz"):
        open_images(str(tmp_path / "raw.npz"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_npz_is_refused(tmp_path, share):
    np.savez(tmp_path / "cut.npz", images=np.zeros((2, 40, 40, 3), np.uint8))
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"cut.npz'?: must be an undamaged .npz"):
        open_images(str(tmp_path / "cut.npz"))


def test_npz_whose_header_claims_more_than_it_holds_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 3)})
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(DataError, match=r"claim.npz'?: must be an undamaged .npz"):
        open_images(str(tmp_path / "claim.npz"))


# --------------------------------------------------------------------------- subsets


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.integers(1, 130), st.integers(0, 3))
def test_stratified_gives_each_class_its_share(labels, limit, seed):
    images = indexed_set(labels)
    chosen = stratified(images, limit, seed)
    limit = min(limit, len(labels))
    assert len(chosen) == limit
    have, want = Counter(chosen.labels.tolist()), Counter(labels)
    # What defines Sainte-Lague: nobody's last place was cheaper to give to a class that could still take one.
    last = max((have[c] - 0.5) / want[c] for c in have)
    following = min(((have[c] + 0.5) / want[c] for c in want if have[c] < want[c]), default=1.0)
    assert last <= following and all(have[c] <= want[c] for c in have)
    order = [int(name) for name in chosen.names]
    assert order == sorted(set(order))  # original order, nothing twice


def test_stratified_keeps_balanced_classes_balanced_and_depends_on_the_seed_alone():
    images = open_images("demo")
    chosen = open_images("demo", limit=100, seed=1)
    assert Counter(chosen.labels.tolist()) == dict.fromkeys(range(10), 10)
    assert chosen.names == open_images("demo", limit=100, seed=1).names
    assert chosen.names != open_images("demo", limit=100, seed=2).names
    assert open_images("demo", limit=500).names == open_images("demo", limit=9999).names == images.names
    assert Counter(open_images("demo", limit=15).labels.tolist()).keys() == set(range(10))
    first = Counter(images.labels[:100].tolist())
    assert set(first.values()) != {10}  # the first 100 would not be balanced


def test_stratified_without_labels_is_a_plain_choice():
    images = indexed_set(None, count=50)
    chosen = stratified(images, 10, 0)
    assert len(chosen) == 10 and chosen.labels is None
    assert chosen.names != images.names[:10]


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one_is_refused(limit):
    with pytest.raises(ConfigError, match=f"must be at least 1, got {limit}"):
        open_images("demo", limit=limit)


def test_subset_keeps_order_labels_and_source(class_folder):
    images = open_images(str(class_folder))
    part = images.subset(np.array([6, 0]))
    assert part.names == ("dog/dog0.png", "ant/ant0.png") and part.labels.tolist() == [2, 0]
    assert part.class_names == images.class_names and part.source == images.source
    with pytest.raises(DataError, match="at least one image"):
        images.subset([])


# --------------------------------------------------------------------------- digests and batches


def test_digest_names_content_and_order(class_folder):
    images = open_images(str(class_folder))
    before = images.digest()
    assert before == open_images(str(class_folder)).digest()
    assert before != images.subset([1, 0, 2, 3, 4, 5, 6]).digest()
    assert len(set(images.content_hashes())) == 7
    shutil.move(class_folder / "ant" / "ant0.png", class_folder / "ant" / "ant00.png")
    assert open_images(str(class_folder)).digest() == before  # a name is not content
    save(class_folder / "ant" / "ant1.png", picture(999))
    assert open_images(str(class_folder)).digest() != before


def test_array_hash_tells_shapes_apart():
    flat = ImageSet("a", ("0", "1"), (np.zeros((2, 8, 1), np.uint8), np.zeros((8, 2, 1), np.uint8)))
    assert flat.content_hashes()[0] != flat.content_hashes()[1]


def test_batches_are_the_images_in_order(class_folder):
    images, seen = open_images(str(class_folder)), []
    got = list(batches(images, RGB, 3, lambda done, total: seen.append((done, total))))
    assert [b.shape for b in got] == [(3, 3, 16, 16), (3, 3, 16, 16), (1, 3, 16, 16)] and got[0].dtype == np.float32
    assert seen == [(3, 7), (6, 7), (7, 7)]
    np.testing.assert_array_equal(np.concatenate(got), np.stack([apply(RGB, images.read(i)) for i in range(7)]))


def test_batches_hold_one_batch_at_a_time():
    images = ImageSet("many", tuple(map(str, range(400))), (np.zeros((64, 64, 3), np.uint8),) * 400)
    contract = Preprocess((64, 64))
    one_batch = 4 * 3 * 64 * 64 * 4
    with memory() as peak:
        count = sum(len(b) for b in batches(images, contract, 4))
    assert count == 400
    assert peak[0] < 6 * one_batch  # two batches, their parts and small change; all 400 images are 100 batches


def test_batches_name_the_image_that_cannot_be_used(class_folder):
    (class_folder / "cat" / "cat2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cat2.png': must be one of"):
        list(batches(open_images(str(class_folder)), RGB, 2))
    save(class_folder / "cat" / "cat2.png", Image.new("RGB", (1, 500)))
    with pytest.raises(DataError, match=r"'cat/cat2.png': the longer side must be at most 100 times"):
        list(batches(open_images(str(class_folder)), RGB, 2))


def test_batch_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="batch size must be at least 1, got 0"):
        next(batches(open_images("demo"), FASHION, 0))


def test_an_image_is_hashed_once(class_folder, monkeypatch):
    """Overlap, caches and provenance all ask for hashes; control: a set opened again reads its files again."""
    read, real = [], data._content_hash
    monkeypatch.setattr(data, "_content_hash", lambda item: read.append(item) or real(item))
    images = open_images(str(class_folder))
    assert images.digest() == images.digest() and images.content_hashes() == images.content_hashes()
    assert read == list(images.items)
    open_images(str(class_folder)).digest()
    assert len(read) == 2 * len(images)
