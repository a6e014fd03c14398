"""What an OpenVINO session takes from a manifest that nobody vouches for, and that threads may share it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from compressor.errors import BundleError
from compressor.lower import lower
from compressor.types import Artifact, BuildOptions
from targets import ov
from tests.models import BASE, random_model, random_pixels


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    graph = lower(random_model(), ov.CAPABILITIES)
    return ov.build(graph, BuildOptions(tmp_path_factory.mktemp("openvino"), "fp32"))


def given(artifact: Artifact, **settings: str) -> Artifact:
    return replace(artifact, settings={**artifact.settings, **settings})


def test_a_setting_that_writes_files_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "anywhere"
    with pytest.raises(BundleError, match="CACHE_DIR") as caught:
        ov.open(given(artifact, CACHE_DIR=str(folder)))
    assert not folder.exists() and "\n" not in str(caught.value)
    assert ov.open(artifact).run({"pixels": random_pixels(BASE, 1)})["logits"].shape == (1, 7)  # the control


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFERENCE_NUM_THREADS", "2"),
        ("NUM_STREAMS", "4"),
        ("NOSUCH", "1"),
        (ov.HINT, "f16"),
        (ov.ROUNDING, "32"),
    ],
)
def test_settings_that_no_build_writes_are_refused(artifact: Artifact, name: str, value: str) -> None:
    with pytest.raises(BundleError, match=f"must be among .*, got {name} '{value}'"):
        ov.open(given(artifact, **{name: value}))


@pytest.mark.parametrize("settings", [{ov.HINT: "f32"}, {ov.HINT: "bf16"}, {ov.HINT: "f32", ov.ROUNDING: "0"}])
def test_settings_that_builds_write_are_taken(artifact: Artifact, settings: Mapping[str, str]) -> None:
    config = ov.open(given(artifact, **settings), threads=2)._config
    assert settings.items() <= config.items() and config["INFERENCE_NUM_THREADS"] == "2"


@pytest.mark.parametrize("count", [1, 2])  # images at a time: the compiled request for one, and the other
def test_threads_that_share_a_session_get_their_own_answers(artifact: Artifact, count: int) -> None:
    images = random_pixels(BASE, 2 * count).reshape(2, count, *random_pixels(BASE, 1).shape[1:])
    reference = ov.open(artifact)
    expected = [reference.run({"pixels": x})["logits"] for x in images]
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # a mix-up would be seen

    session = ov.open(artifact)  # fresh: what it compiles late is compiled under both threads' eyes

    def wrong(which: int) -> int:
        answers = (session.run({"pixels": images[which]})["logits"] for _ in range(300))
        return sum(np.abs(answer - expected[which]).max() > 1e-4 for answer in answers)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong, (0, 1))) == [0, 0]


def test_the_check_sees_a_shared_request(artifact: Artifact) -> None:
    """The negative control: one that lets both threads in mixes their images up."""
    images = random_pixels(BASE, 2)
    session = ov.open(artifact)
    expected = [session.run({"pixels": x[None]})["logits"] for x in images]

    class Open:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    session._turn = cast(Any, Open())

    def wrong(which: int) -> int:
        mixed = 0
        for _ in range(300):
            try:
                answer = session.run({"pixels": images[which : which + 1]})["logits"]
            except RuntimeError:  # the request is busy
                mixed += 1
            else:
                mixed += int(np.abs(answer - expected[which]).max() > 1e-4)
        return mixed

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(wrong, (0, 1))) > 0
