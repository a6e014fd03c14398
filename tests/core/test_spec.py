"""Sizes that no network can have are refused when they are written down, not when it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compressor.errors import ConfigError
from compressor.types import VitSpec
from tests.models import BASE, SPECS, random_model, random_pixels, torch_logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_chans": 0}, "VitSpec.in_chans must be at least 1, got 0"),
        ({"embed_dim": 0}, "VitSpec.embed_dim must be at least 1, got 0"),
        ({"num_classes": -1}, "VitSpec.num_classes must be at least 0, got -1"),
        ({"norm_eps": 0.0}, r"VitSpec.norm_eps must be positive and finite, got 0\.0"),
        ({"norm_eps": -1.0}, r"VitSpec.norm_eps must be positive and finite, got -1\.0"),
        ({"norm_eps": float("nan")}, "VitSpec.norm_eps must be positive and finite, got nan"),
        ({"norm_eps": float("inf")}, "VitSpec.norm_eps must be positive and finite, got inf"),
        ({"pool": "token_avg", "norm_after_pool": True}, "must be token or avg with norm_after_pool, got 'token_avg'"),
        (
            {"pool": "token_dist", "prefix_tokens": 2, "norm_after_pool": True},
            "must be token or avg with norm_after_pool, got 'token_dist'",
        ),
        ({"blocks": ()}, "VitSpec.blocks must hold at least one block, got none"),
        ({"prefix_tokens": 0}, "VitSpec.pool 'token' must have 1 prefix tokens, got 0"),
        ({"image_size": (3, 16)}, r"VitSpec.image_size must be at least one patch, got \(3, 16\) / \(4, 4\)"),
    ],
)
def test_sizes_that_cannot_run_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BASE, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sizes_that_are_accepted_run(spec: VitSpec) -> None:
    """The control."""
    logits = torch_logits(random_model(spec), random_pixels(spec, 2))
    assert logits.shape == (2, spec.num_classes or spec.pooled_dim) and np.isfinite(logits).all()
