"""The quantization stage: what it returns to float, what it reads back, and the sensitivity table it decides by."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from calibration import data
from compressor.cache import Cache
from compressor.errors import ConfigError, DataError
from compressor.quantize import QuantizeConfig, simulate
from compressor.quantize.grid import fake_quant, fake_quant_torch
from compressor.quantize.plan import linears, weight_grid
from compressor.quantize.ranges import fit_grid
from compressor.quantize.sensitivity import sensitivity
from compressor.quantizing import Quantizer
from compressor.types import BlockSpec, Model, Preprocess, VitSpec
from compressor.vit import build, to_torch

SPEC = VitSpec((8, 8), (4, 4), 1, 12, (BlockSpec(2, 5, 6, 20), BlockSpec(3, 4, 4, 16, mlp="swiglu")), num_classes=5)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    weights = {n: 0.3 * torch.randn(p.shape).numpy() for n, p in build(SPEC).state_dict().items()}
    weights |= {n: w + 1 for n, w in weights.items() if "norm" in n and n.endswith("weight")}
    return Model(SPEC, weights, Preprocess((8, 8), mean=(0.5,), std=(0.3,), channels="L"))


@pytest.fixture
def quantizer(model, tmp_path) -> Quantizer:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    images = data.open_images(str(tmp_path / "images.npz"))
    inputs = np.concatenate(list(data.batches(images, model.preprocess, 16)))
    return Quantizer(model, images, inputs, Cache(tmp_path / "cache"), lambda stage, done, total: None)


def inputs(model: Model, pixels: torch.Tensor, site: str) -> torch.Tensor:
    """What the float network reads at `site`."""
    seen = []

    def tap(at: str, x: torch.Tensor) -> torch.Tensor:
        if at == site:
            seen.append(x)
        return x

    to_torch(model)(pixels, tap)
    return seen[0]


def test_nothing_returns_to_float_when_integers_agree(quantizer):
    made = quantizer.quantize(QuantizeConfig("w8a8"), min_agreement=50)
    assert made.kept_float == () and made.agreement >= 50
    assert set(made.refined.quantization.weights) == set(linears(SPEC))


def test_the_most_harmful_sites_return_to_float_until_the_classes_stay(quantizer):
    config = QuantizeConfig("w4a4")
    coarse = quantizer.quantize(config, min_agreement=0)
    wanted = coarse.agreement + 4
    made = quantizer.quantize(config, min_agreement=wanted)
    assert coarse.kept_float == () and made.kept_float
    assert made.agreement >= wanted or len(made.kept_float) >= len(made.sensitivity) // 4
    ranked = sorted(made.sensitivity, key=lambda s: s.divergence / s.macs, reverse=True)
    assert set(made.kept_float) == {s.site for s in ranked[: len(made.kept_float)]}
    floats = {w for s in made.sensitivity if s.site in made.kept_float for w in s.weights}
    assert set(made.refined.quantization.weights) == set(linears(SPEC)) - floats


def test_a_model_of_one_class_is_refused_because_no_change_of_it_would_be_seen(quantizer, model):
    spec = replace(SPEC, num_classes=1)
    head = {name: model.weights[name][:1] for name in ("head.weight", "head.bias")}
    one = replace(quantizer, model=model.with_weights(spec, head))
    with pytest.raises(ConfigError, match="at least two classes, for changes to be counted, got one") as raised:
        one.quantize(QuantizeConfig("w4a4"), min_agreement=98)
    assert "fp32" in raised.value.hint
    assert one.agreement(one.refine(QuantizeConfig("w4a4"))) == 100  # the reason
    assert quantizer.agreement(quantizer.refine(QuantizeConfig("w4a4"))) < 100


@pytest.mark.parametrize("precision", ["w8a8", "w4a32"])
def test_a_finished_refinement_is_read_back_as_it_was_made(quantizer, precision):
    config = QuantizeConfig(precision, asymmetric=("fc2",))
    first, again = quantizer.refine(config), quantizer.refine(config)
    assert again.layers == first.layers and first.layers
    assert len(first.scores) == (4 if precision == "w8a8" else 0)
    x = torch.from_numpy(quantizer.pixels)
    a, b = (simulate(r.model, r.with_scores())(x) for r in (first, again))
    assert torch.equal(a, b) and not torch.equal(a, to_torch(quantizer.model)(x))


def test_sensitivity_is_the_divergence_of_one_site_alone(quantizer, model):
    """Against the whole network run from the pixels, with that site rounded and nothing kept from before."""
    config = QuantizeConfig("w4a8")
    table = sensitivity(model, config, quantizer.pixels)
    assert [s.site for s in table] == list(dict.fromkeys(linears(SPEC).values()))
    assert sum(s.macs for s in table) < SPEC.macs() * 1.2
    x = torch.from_numpy(quantizer.pixels)
    for row in (table[0], table[1], table[-1]):
        rows = inputs(model, x, row.site)
        if row.site == "patch":
            rows = torch.nn.functional.unfold(rows, 4, stride=4).transpose(1, 2)
        stacked = np.concatenate([model.weights[n].reshape(len(model.weights[n]), -1) for n in row.weights])
        grid = fit_grid(rows.flatten(0, -2).numpy(), 8, stacked, config.search, asymmetric=False)
        rounded = {n: fake_quant(model.weights[n], weight_grid(model.weights[n], 4)) for n in row.weights}
        module = to_torch(model.with_weights(SPEC, rounded))
        logits = module(x, lambda at, y, site=row.site, g=grid: fake_quant_torch(y, g) if at == site else y)
        p, q = (y.double().log_softmax(1) for y in (to_torch(model)(x), logits))
        assert row.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
        assert row.divergence > 0


def test_sensitivity_of_weights_alone_leaves_the_inputs(quantizer, model):
    config = QuantizeConfig("w4a32")
    x = torch.from_numpy(quantizer.pixels)
    for row in sensitivity(model, config, quantizer.pixels)[1:3]:
        rounded = {n: fake_quant(model.weights[n], weight_grid(model.weights[n], 4, group=32)) for n in row.weights}
        p, q = (to_torch(m)(x).double().log_softmax(1) for m in (model, model.with_weights(SPEC, rounded)))
        assert row.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


def test_sensitivity_of_a_prediction_that_is_not_finite_is_refused(quantizer, model):
    damaged = quantizer.pixels.copy()
    damaged[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="Activations must be finite"):
        sensitivity(model, QuantizeConfig("w8a8"), damaged)


def test_more_bits_are_less_sensitive_and_the_model_is_left_alone(quantizer, model):
    before = {n: w.copy() for n, w in model.weights.items()}
    coarse, fine = (sensitivity(model, QuantizeConfig(p), quantizer.pixels) for p in ("w4a8", "w8a16"))
    assert all(a.divergence > b.divergence for a, b in zip(coarse, fine, strict=True))
    assert all(np.array_equal(model.weights[n], w) for n, w in before.items())
