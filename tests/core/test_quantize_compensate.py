"""The published low-rank compensation: tail error, truncation, and corrections that help or are left out."""

import numpy as np
import pytest
import torch

from compressor.errors import ConfigError, DataError
from compressor.quantize.compensate import (
    Budget,
    LowRankConfig,
    Threshold,
    low_rank,
    tail_relative_error,
    truncate_plain,
    truncate_weighted,
)
from compressor.quantize.grid import symmetric
from compressor.quantize.simulate import fake_quant_tap, on_grid
from compressor.types import BlockSpec, Model, Preprocess, Quantization, VitSpec
from compressor.vit import build, to_torch

SPEC = VitSpec((8, 8), (4, 4), 1, 12, (BlockSpec(2, 5, 6, 20), BlockSpec(3, 4, 4, 16)), num_classes=5)


def model() -> Model:
    torch.manual_seed(0)
    weights = {n: 0.3 * torch.randn(p.shape).numpy() for n, p in build(SPEC).state_dict().items()}
    return Model(SPEC, weights, Preprocess((8, 8), mean=(0.0,), std=(1.0,), channels="L"))


def grids(exact: Model, bits: int) -> Quantization:
    names = [n for n in exact.weights if n.startswith("blocks") and "norm" not in n and n.endswith("weight")]
    return Quantization({n: symmetric(np.abs(exact.weights[n]).max(1), bits, axis=0) for n in names}, {})


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, 8, 8)).astype(np.float32)


def test_tail_relative_error_looks_at_the_largest_only():
    y = torch.tensor([[1.0, -8.0], [4.0, 0.5]])
    off = y + torch.tensor([[3.0, 0.8], [0.0, -2.0]])
    assert tail_relative_error(y, off, 0.25) == pytest.approx(0.64 / 64)
    assert tail_relative_error(y, off, 0.5) == pytest.approx(0.64 / 80)
    assert tail_relative_error(y, off, 1.0) == pytest.approx((9 + 0.64 + 4) / 81.25)
    assert tail_relative_error(y, y, 1.0) == 0


def test_truncations_are_exact_at_full_rank_and_each_best_at_its_own_aim():
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 8, dtype=torch.float64, generator=g)
    x = torch.randn(500, 8, dtype=torch.float64, generator=g) * torch.logspace(-2, 1, 8, dtype=torch.float64)
    second = x.T @ x / len(x)
    error = {}
    for name, truncate in (("plain", truncate_plain), ("weighted", truncate_weighted)):
        down, up = truncate(weight, second, 8)
        assert torch.allclose(down @ up, weight, atol=1e-9)
        down, up = truncate(weight, second, 2)
        assert down.shape == (8, 2)
        error[name] = ((down @ up - weight).square().sum(), (x @ (down @ up - weight)).square().sum())
    assert error["plain"][0] < error["weighted"][0]
    assert error["weighted"][1] < error["plain"][1]


@pytest.mark.parametrize("truncate", [truncate_plain, truncate_weighted])
def test_low_rank_helps_on_images_it_never_saw(truncate):
    exact, held_out = model(), torch.from_numpy(images(60, 9))
    plan = grids(exact, 3)
    found = low_rank(
        exact, plan, [images(60, 1), images(60, 2)], LowRankConfig(12, gate=Threshold(0.0), truncate=truncate)
    )
    quantized, plain = to_torch(on_grid(exact, plan.weights)), fake_quant_tap(plan.activations)
    reference = to_torch(exact)(held_out)
    before = (quantized(held_out, plain) - reference).square().sum()
    after = (quantized(held_out, found.tap(plain)) - reference).square().sum()
    assert after < 0.9 * before
    assert found.macs == len(found.branches) * 2 * 12 * 12 * SPEC.tokens


def test_low_rank_leaves_out_what_the_gate_and_the_held_out_half_refuse():
    exact = model()
    loose = low_rank(exact, grids(exact, 3), [images(40, 1)], LowRankConfig(4, gate=Threshold(0.0)))
    assert set(loose.scores) == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")}
    assert loose.branches
    strict = low_rank(exact, grids(exact, 3), [images(40, 1)], LowRankConfig(4, gate=Threshold(1e9)))
    assert not strict.branches
    assert strict.macs == 0
    nothing_wrong = low_rank(exact, Quantization({}, {}), [images(40, 1)], LowRankConfig(4, gate=Threshold(0.0)))
    assert not nothing_wrong.branches
    assert max(nothing_wrong.scores.values()) == 0


@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_budget_buys_the_corrections_that_gain_most(of):
    """At full rank, against least squares written out."""
    exact, batch, plan = model(), images(60, 1), grids(model(), 3)
    cost, total = (2 * 12 * 12 * SPEC.tokens, SPEC.macs()) if of == "macs" else (2 * 12 * 12 + 12, exact.params)
    float_, rounded = to_torch(exact), to_torch(on_grid(exact, plan.weights))
    stream, gains = rounded.embed(torch.from_numpy(batch)), {}
    for i, (dense, small) in enumerate(zip(float_.blocks, rounded.blocks, strict=True)):
        for part in ("attention", "mlp"):
            y, y_q = getattr(dense, part)(stream), getattr(small, part)(stream)
            rows = torch.cat(
                [stream, torch.ones_like(stream[..., :1])], dim=-1
            ).double()  # least squares, with intercept
            delta = (y - y_q).double()
            full = torch.linalg.lstsq(rows[::2].flatten(0, 1), delta[::2].flatten(0, 1)).solution
            left = delta[1::2] - rows[1::2] @ full
            gains[f"blocks.{i}.{part.replace('attention', 'attn')}"] = float((delta[1::2] ** 2).sum() - (left**2).sum())
            stream = stream + y_q
    ranked = sorted(gains, key=lambda site: -gains[site])
    for count in (0, 1, 2):
        found = low_rank(exact, plan, [batch], LowRankConfig(12, gate=Budget((count + 0.5) * cost / total, of)))
        assert set(found.branches) == set(ranked[:count])


def test_low_rank_refuses_bad_settings_and_no_images():
    with pytest.raises(ConfigError, match="rank >= 1"):
        LowRankConfig(0)
    with pytest.raises(ConfigError, match=r"share > 0 of macs or params, got Budget\(share=0.0"):
        Budget(0.0)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="finite damping >= 0"):
            LowRankConfig(damping=wrong)
    for batches in ([], [images(0, 1)]):
        with pytest.raises(DataError, match="at least one image"):
            low_rank(model(), Quantization({}, {}), batches, LowRankConfig())
