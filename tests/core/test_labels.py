"""`match_labels`: class folders onto the model's classes."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.data import ImageSet, match_labels
from compressor.errors import DataError
from tests.core.pictures import indexed_set


def folder_set(*classes: str) -> ImageSet:
    n = len(classes)
    return ImageSet("set", tuple(map(str, range(n))), (np.zeros((2, 2, 1), np.uint8),) * n, np.arange(n), classes)


LABELS = ("T-shirt/top", "Trouser", "Ankle boot")


@pytest.mark.parametrize(
    ("folders", "labels", "expected"),
    [
        (("Ankle boot", "T-shirt_top", "Trouser"), LABELS, [2, 0, 1]),  # by name, another order
        (("ankle-boot", "trouser"), LABELS, [2, 1]),  # by name, not all
        (("a", "b", "c"), LABELS, [0, 1, 2]),  # by sorted position
        (("0", "1", "10", "2"), tuple("abcdefghijk"), [0, 1, 10, 2]),  # numbers are indices, not positions
        (("02", "00"), LABELS, [2, 0]),
        (("1", "0"), ("0", "1"), [1, 0]),  # a class may be called by a number
        (("n01440764", "n01443537", "n01484850"), LABELS, [0, 1, 2]),
        (("crane", "bird"), ("crane", "crane"), [0, 1]),  # an ambiguous name is none: by position
    ],
)
def test_match_labels(folders, labels, expected):
    assert match_labels(folder_set(*folders), labels).tolist() == expected


@pytest.mark.parametrize(
    ("folders", "labels", "message", "hint"),
    [
        (("a", "b"), LABELS, "must have 3 class folders like the model, got 2", "Name the folders"),
        (("Trouser", "Ankle bot", "x"), LABELS, "class folder 'Ankle bot' must be named", "Did you mean 'Ankle boot'"),
        (("Trouser", "junk"), LABELS, "class folder 'junk' must be named like a class", "move it away"),
        (("1", "2", "3"), LABELS, "indices must be below the model's 3 classes, got 3", "count from 0"),
    ],
)
def test_match_labels_refuses_what_cannot_be_the_models(folders, labels, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        match_labels(folder_set(*folders), labels)
    assert hint in caught.value.hint


def test_match_labels_of_arrays_and_models_without_names():
    assert match_labels(indexed_set([2, 0]), LABELS).tolist() == [2, 0]
    assert match_labels(indexed_set([2, 0]), (), 3).tolist() == [2, 0]
    with pytest.raises(DataError, match="made: class indices must be below the model's 2 classes, got 2"):
        match_labels(indexed_set([2, 0]), (), 2)
    with pytest.raises(DataError, match="must have labels to measure accuracy"):
        match_labels(indexed_set(None, count=3), LABELS)
    with pytest.raises(DataError, match="got a feature extractor"):
        match_labels(indexed_set([0]), ())
