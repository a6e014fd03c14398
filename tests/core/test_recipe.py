"""Recipes: what a YAML file may say, and the sentence for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.recipe import Recipe, from_yaml, override


def read(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return from_yaml(folder / "recipe.yaml")


def test_a_recipe_is_read(tmp_path: Path) -> None:
    found = read(
        tmp_path, "targets: openvino\ndamping: 0.1\nmlp_ratio: 0.5\nimage_size:\neval: null\nmin_agreement: 99\n"
    )
    assert found == Recipe(targets=("openvino",), damping=0.1, mlp_ratio=0.5, min_agreement=99)
    assert override(found, {"damping": "auto", "mlp_ratio": None}).damping == "auto"  # a flag can take a number back
    assert override(found, {"damping": None}).damping == 0.1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("targets: 5", "targets must be a name or a list of names, got 5"),
        ("targets:", "targets must be a name or a list of names, got None"),
        ("targets: [ort, 5]", "targets must be a valid string"),
        ("seed:", "seed must be a valid integer, got None"),
        ("threads: x", "threads must be a valid integer, got 'x'"),
        ("calib_size:", "calib_size must be a valid integer, got None"),
        ("data: 5", "data must be a valid string, got 5"),
        ("pruner: corpse", "pruner must be 'corp' or 'obs', got 'corpse'"),
        ("mlp_ratio: 1", "mlp_ratio must be in"),
        ("target_macs: 0", "target_macs must be in"),
        ("target_params: 50", "target_params must be in"),
        ("damping: -1", "damping must be auto or a positive number, got -1"),
        ("damping: .inf", "damping must be auto or a positive number, got inf"),
        ("match: f.json\nselect: k_centre", "select must not be given with match"),
        ("threads: 999", "threads must be an integer of 1 to 256, got 999"),
        ("mlp_ration: 0.5", "mlp_ration"),
        ("- 5", "must be a mapping"),
    ],
)
def test_what_a_recipe_may_not_say_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        read(tmp_path, text)
