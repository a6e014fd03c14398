"""Equalisation: the fold against the network it must not change, and the gate against planted outliers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from calibration import data
from compressor import checkpoint
from compressor.errors import ConfigError
from compressor.quantize.equalize import CLEAR, EXPONENTS, equalize, expected_error, factors, fold
from compressor.quantize.grid import fake_quant, symmetric
from compressor.quantize.plan import QuantizeConfig
from compressor.quantize.refine import RefineConfig, Refined, refine
from compressor.quantize.rounding import nearest
from compressor.quantize.sensitivity import sensitivity
from compressor.quantize.simulate import simulate
from compressor.types import Array, BlockSpec, Model, VitSpec
from compressor.vit import VisionTransformer, to_torch
from tests.models import BASE, SPECS, blocks, random_model, random_pixels, torch_logits


def sites(spec: VitSpec) -> dict[str, tuple[str, ...]]:
    """Everything that can be folded into, and all linears that read it."""
    found: dict[str, tuple[str, ...]] = {}
    for i, block in enumerate(spec.blocks):
        mlp = ("fc1", "gate") if block.mlp == "swiglu" else ("fc1",)
        for source, readers in (("norm1", ("q", "k", "v")), ("v", ("proj",)), ("norm2", mlp)):
            found[f"blocks.{i}.{source}"] = tuple(f"blocks.{i}.{reader}" for reader in readers)
    return found


def folded(model: Model, draw: Callable[[int], Array], leave: int = 0) -> VisionTransformer:
    """`model` with drawn factors everywhere, of which the last `leave` readers know nothing."""
    module = to_torch(model)
    for source, readers in sites(model.spec).items():
        fold(module, source, readers[: len(readers) - leave], draw(len(model.weights[f"{source}.bias"])))
    return module


def planted(model: Model, by: float, count: int = 4) -> Model:
    """The same function in float, with `count` channels of every foldable site `by` times as large."""
    rng = np.random.default_rng(0)

    def draw(width: int) -> Array:
        factor = np.ones(width, np.float32)
        factor[rng.choice(width, count, replace=False)] = 1 / by
        return factor

    weights = {name: p.numpy() for name, p in folded(model, draw).state_dict().items()}
    return model.with_weights(model.spec, weights)


# --------------------------------------------------------------------------- the fold


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_fold_of_powers_of_two_changes_no_bit(name):
    model, rng = random_model(SPECS[name]), np.random.default_rng(0)
    draw = lambda width: np.exp2(rng.integers(0, 7, width)).astype(np.float32)  # noqa: E731
    x = random_pixels(SPECS[name])
    with torch.inference_mode():
        assert torch.equal(folded(model, draw)(torch.from_numpy(x)), torch.from_numpy(torch_logits(model, x)))
        assert not np.allclose(folded(model, draw, leave=1)(torch.from_numpy(x)), torch_logits(model, x), atol=1e-3)


@pytest.mark.parametrize("spec", [BASE, blocks(mlp="swiglu"), blocks(qk_norm=True)])
def test_a_fold_of_any_factors_is_exact_in_exact_arithmetic(spec):
    model, rng = random_model(spec), np.random.default_rng(0)
    x = torch.from_numpy(random_pixels(spec)).double()
    module = to_torch(model).double()
    with torch.inference_mode():
        exact = module(x)
        for source, readers in sites(spec).items():
            fold(module, source, readers, rng.uniform(0.1, 50, len(model.weights[f"{source}.bias"])))
        assert torch.allclose(module(x), exact, rtol=0, atol=1e-10)  # float64
    assert all(np.array_equal(w, random_model(spec).weights[n]) for n, w in model.weights.items())  # the source is kept


# --------------------------------------------------------------------------- factors and their choice


def test_factors_are_powers_of_two_that_only_make_smaller():
    rows, weight = np.array([[1.0, -3, 60, 0, 5]], np.float32), np.array([[1.0, 1, 0.5, 1, 0]], np.float32)
    for exponent in EXPONENTS:
        found = factors(rows, weight, exponent)
        x, w = np.abs(rows[0, :3]), np.abs(weight[0, :3])
        plain = x**exponent / w ** (1 - exponent)  # channels that are dead have none
        assert found.dtype == np.float32
        assert found[3] == found[4] == 1
        expected = np.maximum(2.0 ** np.rint(np.log2(plain / np.median(plain))), 1)
        assert found[:3].tolist() == expected.tolist()


def test_the_closed_form_is_the_error_of_rounding():
    rng = np.random.default_rng(0)
    x, w = rng.uniform(-3, 3, (4000, 16)).astype(np.float32), rng.standard_normal((32, 16)).astype(np.float32)
    grids = symmetric(float(np.abs(x).max()), 6), symmetric(np.abs(w).max(1), 5, axis=0)
    measured = np.square(fake_quant(x, grids[0]) @ fake_quant(w, grids[1]).T - x @ w.T).sum(1).mean()
    assert expected_error(x, w, (5, 6)) == pytest.approx(measured, rel=0.1)
    assert expected_error(x, w, (6, 6)) < 0.5 * measured  # the control


def outliers(by: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    rows, weight = rng.standard_normal((600, 24)).astype(np.float32), rng.standard_normal((40, 24)).astype(np.float32)
    rows[:, :2] *= by
    return rows, weight


@pytest.mark.parametrize("precision", ["w8a8", "w6a6", "w4a8", "w4a4"])
def test_outliers_are_equalized_and_ordinary_channels_are_not(precision):
    rows, weight = outliers(1.0)
    config = QuantizeConfig(precision)
    plain = equalize(rows, weight, "blocks.0.qkv", config)
    assert plain.exponent is None and (plain.factor == 1).all()
    rows[:, :2] *= 64
    weight[:, :2] /= 64
    found = equalize(rows, weight, "blocks.0.qkv", config)
    assert found.exponent in EXPONENTS
    assert found.factor[:2].min() >= 32 and np.median(found.factor[2:]) == 1
    assert equalize(rows, weight, "blocks.0.qkv", config, ()).exponent is None


@pytest.mark.parametrize("precision", ["fp8", "w8a32", "w4a32"])
def test_where_a_common_factor_gains_nothing_none_is_tried(precision):
    assert equalize(*outliers(64.0), "blocks.0.qkv", QuantizeConfig(precision)).exponent is None


def test_the_other_half_of_the_rows_has_the_last_word():
    """What the factors were made for is seen in one half only; there they would have been taken."""
    rows, weight = outliers(1.0)
    rows[1::2, 2:] *= 64
    rows[::2, :2] *= 64
    weight[:, :2] /= 64
    one, config = rows[::2], QuantizeConfig("w8a8")
    assert equalize(one, weight, "blocks.0.qkv", config).exponent is not None
    best = min(expected_error(one / f, weight * f, (8, 8)) for f in (factors(one, weight, a) for a in EXPONENTS))
    assert best < CLEAR * expected_error(one, weight, (8, 8))
    assert equalize(rows, weight, "blocks.0.qkv", config).exponent is None


# --------------------------------------------------------------------------- in the sequential pass


def kl(model: Model, made: Refined, pixels: Array) -> float:
    exact, got = torch_logits(model, pixels), simulate(made.model, made.quantization)(torch.from_numpy(pixels))
    p, q = torch.from_numpy(exact).double().log_softmax(1), got.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_refine_equalizes_a_whole_site_and_reports_it(mlp):
    model = planted(random_model(blocks(mlp=mlp)), 64)
    seen, unseen = random_pixels(model.spec, 48), random_pixels(model.spec, 32, seed=2)
    grid = QuantizeConfig(
        "w8a8", asymmetric=("fc2", "patch"), skip=("blocks.0.[kv].weight", "blocks.1.fc*", "*.gate.*")
    )
    config = RefineConfig(grid)
    made, plain = (refine(model, [seen], c, {}) for c in (config, RefineConfig(grid, exponents=())))
    assert kl(model, made, unseen) < 0.3 * kl(model, plain, unseen)
    chosen = {layer.name.removesuffix(".weight"): layer.exponent for layer in made.layers}
    for site in (("blocks.0.q", "blocks.0.k", "blocks.0.v"), ("blocks.1.q", "blocks.1.k", "blocks.1.v")):
        assert chosen[site[0]] is not None  # k and v of block 0 are in float, and folded with q
        assert len({chosen[name] for name in site}) == 1
    assert chosen["blocks.0.proj"] is not None and chosen["blocks.1.proj"] is not None
    for name in ("patch", "head", "blocks.0.fc2", "blocks.1.fc1"):
        assert chosen[name] is None  # of block 1, no reader of norm2 is in integers
    assert all(layer.exponent is None for layer in plain.layers)
    for name, q in made.quantization.weights.items():
        assert np.array_equal(fake_quant(made.model.weights[name], q), made.model.weights[name])


def test_an_exponent_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"exponents must lie between 0 and 1, got \(1.5,\)"):
        RefineConfig(exponents=(1.5,))


def test_sensitivity_sees_a_site_as_it_will_be_equalized():
    spec = VitSpec((16, 16), (4, 4), 3, 24, (BlockSpec(2, 6, 8, 20),), num_classes=7)
    ordinary = random_model(spec)
    outlying, pixels = planted(ordinary, 64), random_pixels(spec, 32)
    table, expected = (
        {s.site: s.divergence for s in sensitivity(m, QuantizeConfig("w6a6"), pixels)} for m in (outlying, ordinary)
    )
    assert table["blocks.0.qkv"] < 3 * expected["blocks.0.qkv"]
    assert table["blocks.0.fc2"] == pytest.approx(expected["blocks.0.fc2"], rel=1e-3)


# --------------------------------------------------------------------------- on a trained model


def test_trained_blocks_lose_little_with_outliers_only_when_these_are_equalized():
    whole = checkpoint.load("demo")
    spec = replace(whole.spec, blocks=whole.spec.blocks[:2])
    model = Model(spec, {name: whole.weights[name] for name in spec.shapes()}, whole.preprocess)
    pixels = np.concatenate(list(data.batches(data.open_images("demo", limit=48), model.preprocess, 24)))
    make = partial(refine, planted(model, 64), [pixels[:24]], importance={})
    config = RefineConfig(QuantizeConfig("w8a8", asymmetric=("fc2", "patch")), (), nearest, tokens_per_image=24)
    plain, made = (make(config=c) for c in (replace(config, exponents=()), config))
    assert sum(layer.exponent is not None for layer in made.layers) == 10  # q, k, v, proj and fc1 of each block
    assert kl(model, made, pixels[24:]) < 0.3 * kl(model, plain, pixels[24:])
    assert kl(model, made, pixels[24:]) < 3 * kl(model, refine(model, [pixels[:24]], config, {}), pixels[24:])
