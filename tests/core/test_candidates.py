"""What becomes of the files of candidates that lost."""

from dataclasses import replace

import numpy as np
import pytest

from compressor.candidates import Candidate, choose, discard
from compressor.types import Artifact, Parity


def candidate(label: str, path, ms: float, agreement: float = 1.0) -> Candidate:
    path.touch()
    precision = label.split(maxsplit=1)[0].removesuffix("-scores")
    artifact = Artifact("openvino", path, "0" * 64, 1, precision, (), (), {}, (path,))  # type: ignore[arg-type]
    samples = tuple(int(1e6 * ms * (1 + 0.01 * (i % 5))) for i in range(50))
    return Candidate(label, artifact, Parity(0.0, 1.0, agreement, 256), samples, np.zeros((8, 2)))


@pytest.fixture
def three(tmp_path) -> tuple[Candidate, ...]:
    """fp32, and one int8 file under two settings."""
    exact = candidate("fp32", tmp_path / "fp32.xml", 1.0)
    integer = candidate("w8a8", tmp_path / "w8a8.xml", 2.0)
    return exact, integer, replace(integer, label="w8a8 (HINT=f32)")


def test_files_shared_by_two_losers_go_once(three, tmp_path):
    discard(three, three[0])
    assert [f.name for f in tmp_path.iterdir()] == ["fp32.xml"]


def test_files_shared_by_a_loser_and_the_winner_stay(three, tmp_path):
    discard(three, three[2])
    assert [f.name for f in tmp_path.iterdir()] == ["w8a8.xml"]


def test_a_variant_that_is_faster_is_kept_and_named(three, tmp_path):
    fast = candidate("w8a8 (HINT=f32)", tmp_path / "other.xml", 0.5)
    kept, reverted, reason = choose((*three[:2], fast), "auto", 98.0)
    assert kept is fast and not reverted and reason.startswith("w8a8 (HINT=f32) kept: fp32 1")


def test_scores_in_integers_must_agree_even_where_their_precision_was_asked_for(three, tmp_path):
    fast = candidate("w8a8-scores", tmp_path / "w8a8-scores.xml", 0.3, agreement=0.97)
    slower = candidate("w8a8", tmp_path / "w8a8.xml", 0.5, agreement=0.97)
    kept, _, reason = choose((three[0], slower, fast), "w8a8", 98.0)
    assert kept is slower and "w8a8-scores 0.3" in reason and "not eligible at 97.0 % agreement" in reason
    assert choose((three[0], slower, fast), "w8a8", 96.0)[0] is fast  # the control


def test_a_fast_one_that_changes_too_many_classes_is_not(three, tmp_path):
    wrong = candidate("w8a8 (HINT=f32)", tmp_path / "other.xml", 0.5, agreement=0.9)
    kept, reverted, reason = choose((*three[:2], wrong), "auto", 98.0)
    assert kept is three[0] and reverted and "not eligible at 90.0 % agreement" in reason
