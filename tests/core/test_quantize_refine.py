"""Rounding, regression, token importance and the sequential pass against slow references and controls that must fail."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ConfigError, DataError
from compressor.quantize.grid import fake_quant, fake_quant_torch, symmetric
from compressor.quantize.importance import FLOOR, token_importance
from compressor.quantize.plan import QuantizeConfig, linears
from compressor.quantize.ranges import fit_grid, sample_rows
from compressor.quantize.refine import RefineConfig, refine
from compressor.quantize.regression import Regression
from compressor.quantize.rounding import DAMPING, nearest, second_order
from compressor.quantize.search import golden
from compressor.quantize.simulate import simulate
from compressor.types import BlockSpec, Model, Preprocess, QParams, VitSpec
from compressor.vit import build, to_torch

SPEC = VitSpec((8, 8), (4, 4), 1, 12, (BlockSpec(2, 5, 6, 20), BlockSpec(3, 4, 4, 16, mlp="swiglu")), num_classes=5)


def random_model(spec: VitSpec = SPEC, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    weights = {n: 0.3 * torch.randn(p.shape).numpy() for n, p in build(spec).state_dict().items()}
    weights |= {n: w + 1 for n, w in weights.items() if "norm" in n and n.endswith("weight")}
    return Model(spec, weights, Preprocess((8, 8), mean=(0.0,), std=(1.0,), channels="L"))


def images(count: int, seed: int = 0) -> np.ndarray:
    """Smooth random images: a few waves, so that the network's inputs are correlated as real ones are."""
    rng = np.random.default_rng(seed)
    waves = np.stack(
        [np.outer(np.sin(k * np.arange(8) / 2 + p), np.cos(p * np.arange(8) / 3)) for k in range(4) for p in range(3)]
    )
    return np.einsum("nk,khw->nhw", rng.standard_normal((count, 12)), waves)[:, None].astype(np.float32)


def spd(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(rank or 3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


# --------------------------------------------------------------------------- scores


def test_grids_of_q_and_k_spare_their_product_and_leave_the_rest_alone():
    model, batch = random_model(), images(40)
    made = refine(model, [batch], RefineConfig(QuantizeConfig("w6a6")), {})
    assert set(made.scores) == {f"blocks.{i}.{part}" for i in (0, 1) for part in "qk"}
    assert all(q.bits == 8 and q.zero_point == 0 for q in made.scores.values())
    assert not set(made.scores) & set(made.quantization.activations)
    seen = {}

    def look(site: str, x: torch.Tensor) -> torch.Tensor:
        seen[site] = x
        return x

    to_torch(made.model)(torch.from_numpy(images(60, 1)), look)

    def loss(grid: Callable[[str], QParams]) -> float:
        q, k = (seen[f"blocks.1.{part}"] for part in "qk")
        rough = [fake_quant_torch(x, grid(f"blocks.1.{part}")) for part, x in (("q", q), ("k", k))]
        return float((q @ k.mT - rough[0] @ rough[1].mT).square().mean())

    found = loss(lambda site: made.scores[site])
    assert found < 1.02 * loss(lambda site: symmetric(float(seen[site].abs().max()), 8))
    assert found < 0.5 * loss(lambda site: symmetric(4 * float(seen[site].abs().max()), 8))  # the control


def test_a_bias_of_k_goes_and_nothing_else_changes():
    made = refine(random_model(), [images(40)], RefineConfig(QuantizeConfig("w8a8")), {})
    assert not made.model.weights["blocks.0.k.bias"].any()
    biased = made.model.with_weights(SPEC, {"blocks.0.k.bias": np.ones(10, np.float32)})
    x = torch.from_numpy(images(9, 2))
    same, other = (simulate(m, made.quantization)(x) for m in (made.model, biased))
    assert torch.allclose(same, other, atol=1e-5)
    assert not torch.allclose(same, simulate(made.model, made.with_scores())(x), atol=1e-5)  # the control


@pytest.mark.parametrize("precision", ["w8a8", "w4a32"])
def test_no_grids_of_q_and_k_where_their_product_cannot_run_in_integers(precision):
    spec = replace(SPEC, blocks=(replace(SPEC.blocks[0], qk_norm=precision == "w8a8"),))
    assert not refine(random_model(spec), [images(20)], RefineConfig(QuantizeConfig(precision)), {}).scores


# --------------------------------------------------------------------------- rounding


def slow_second_order(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """One weight at a time; after each, the best real values of the columns left, by solving their normal equations."""
    order = np.argsort(-np.diag(gram), kind="stable")
    h = gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    out = np.empty_like(weight)
    for r, row in enumerate(weight):
        left = row.copy()
        for n, j in enumerate(order):
            out[r, j] = np.clip(np.rint(left[j] / scale[r]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale[r]
            rest = order[n + 1 :]
            left[rest] += np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j] * (left[j] - out[r, j]))
            left[j] = out[r, j]
    return out


@pytest.mark.parametrize("bits", [4, 6])
def test_second_order_equals_solving_for_the_columns_left(bits):
    weight, gram = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), spd(9, 1)
    q = symmetric(weight.abs().amax(1).numpy(), bits, axis=0)
    slow = slow_second_order(weight.numpy(), gram.numpy(), q.scale.astype(np.float64), bits)
    plain = nearest(weight, gram, q).numpy()
    error = [np.einsum("oi,ij,oj->o", d, gram.numpy(), d) for d in (weight.numpy() - slow, weight.numpy() - plain)]
    expected = np.where((error[0] < error[1])[:, None], slow, plain)
    assert np.allclose(second_order(weight, gram, q).numpy(), expected, atol=1e-9)


def test_sums_that_rounding_left_indefinite_are_damped_until_they_factor():
    """Six rows of 40 columns around a large mean, multiplied in float32 as the statistics are."""
    x = 1e-3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) + 100
    gram = (x.T @ x).double() / 6 - torch.outer(x.mean(0).double(), x.mean(0).double())
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(40)
    with pytest.raises(torch.linalg.LinAlgError):  # the control
        torch.linalg.cholesky(damped)
    weight = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q = symmetric(weight.abs().amax(1).numpy(), 4, axis=0)
    assert torch.isfinite(second_order(weight, gram, q)).all()


def test_a_large_mean_does_not_cost_the_variance():
    """Against float64 least squares; sums of x x^T in float32 would be off by more than the variance itself."""
    generator = torch.Generator().manual_seed(3)
    x = 1e-2 * torch.randn(400, 5, generator=generator) + 50
    true = torch.randn(2, 5, generator=generator)
    y = (x - 50) @ true.T
    sums = Regression(x[:50].mean(0), 2)
    for half in (0, 1):
        sums.add(half, x[half::2], y[half::2], torch.ones(200))
    fit = sums.fit(torch.zeros(2, 5, dtype=torch.float64), (1e-4,))
    assert torch.allclose(fit.weight.float(), true, rtol=1e-2, atol=1e-3)


@given(st.integers(0, 999), st.sampled_from([4, 6, 8]), st.integers(2, 150), st.booleans())
@settings(max_examples=25, deadline=None)
def test_second_order_is_on_the_grid_and_never_worse(seed, bits, width, deficient):
    gram = spd(width, seed, rank=max(1, width // 3) if deficient else None)
    weight = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = symmetric(weight.abs().amax(1).numpy(), bits, axis=0)
    fed, plain = second_order(weight, gram, q), nearest(weight, gram, q)
    error = [((w - weight) @ gram * (w - weight)).sum(1) for w in (fed, plain)]
    assert (error[0] <= error[1]).all()
    assert np.allclose(fake_quant(fed.float().numpy(), q), fed.numpy(), rtol=1e-6)


def test_second_order_gains_on_correlated_inputs_and_only_there():
    weight = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q = symmetric(weight.abs().amax(1).numpy(), 4, axis=0)
    correlated = spd(32, 1) + 20
    error = [
        ((w - weight) @ correlated * (w - weight)).sum()
        for w in (f(weight, correlated, q) for f in (second_order, nearest))
    ]
    assert error[0] < 0.3 * error[1]
    assert torch.equal(second_order(weight, torch.eye(32, dtype=torch.float64), q), nearest(weight, correlated, q))
    assert torch.equal(
        second_order(weight, torch.zeros(32, 32, dtype=torch.float64), q), nearest(weight, correlated, q)
    )


# --------------------------------------------------------------------------- regression


def regression(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> Regression:
    sums = Regression(x.mean(0), y.shape[1])
    for half in (0, 1):
        sums.add(half, x[half::2], y[half::2], weight[half::2])
    return sums


def test_regression_equals_weighted_ridge_with_intercept():
    g = torch.Generator().manual_seed(3)
    x, y, w = torch.randn(200, 6, generator=g) + 1, torch.randn(200, 4, generator=g), torch.rand(200, generator=g)
    old = torch.randn(4, 6, dtype=torch.float64, generator=g)
    fit = regression(x, x @ torch.ones(6, 4) + y, w).fit(old, (0.5,))
    # slow: augmented least squares in NumPy, rows scaled by sqrt(weight), intercept unpenalised
    xs, ys, ws = x.double().numpy(), (x @ torch.ones(6, 4) + y).double().numpy(), w.double().numpy()
    centred = xs - np.average(xs, axis=0, weights=ws)
    ridge = 0.5 * np.average(centred**2, axis=0, weights=ws).mean()
    a = np.vstack(
        [np.sqrt(ws / ws.sum())[:, None] * np.c_[xs, np.ones(200)], np.c_[np.sqrt(ridge) * np.eye(6), np.zeros(6)]]
    )
    b = np.vstack([np.sqrt(ws / ws.sum())[:, None] * ys, np.sqrt(ridge) * old.numpy().T])
    slow = np.linalg.lstsq(a, b, rcond=None)[0].T
    assert fit.damping == 0.5
    # float32 products summed in float64
    assert np.allclose(fit.weight, slow[:, :6], atol=1e-5)
    assert np.allclose(fit.bias(fit.weight), slow[:, 6], atol=1e-5)


def test_regression_keeps_the_weights_where_the_other_half_says_so():
    g = torch.Generator().manual_seed(4)
    x, old = torch.randn(40, 30, generator=g), torch.randn(5, 30, dtype=torch.float64, generator=g)
    noise = 0.5 * torch.randn(40, 5, generator=g)
    right = regression(x, x @ old.float().T + noise, torch.ones(40)).fit(old, (1e-3, 1e-2))
    assert right.damping is None
    assert torch.equal(right.weight, old)
    wrong = regression(x, 0.2 * noise, torch.ones(40)).fit(old, (1e-3, 1e-2))
    assert wrong.damping is not None  # control: weights that are wrong are replaced


def test_regression_through_a_matrix_is_the_regression_of_its_outputs():
    g = torch.Generator().manual_seed(5)
    x, clean, w = torch.randn(90, 6, generator=g), torch.randn(90, 6, generator=g), torch.ones(90)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=g)
    through = regression(x, clean, w).fit(weight, (0.1,), weight)
    direct = regression(x, clean @ weight.float().T, w).fit(weight, (0.1,))
    assert torch.allclose(through.weight, direct.weight, atol=1e-5)
    assert torch.allclose(through.bias(through.weight), direct.bias(direct.weight), atol=1e-5)


# --------------------------------------------------------------------------- importance and ranges


def test_importance_knows_which_tokens_reach_the_answer():
    table = token_importance(to_torch(random_model()), [images(8)])
    last = table["blocks.1.fc2"]
    assert torch.allclose(last[1:], torch.full((4,), FLOOR))  # behind the last attention only the class token is read
    assert last[0] > 4
    assert table["blocks.0.fc2"][1:].min() > 1.2 * FLOOR  # one block earlier the others still count
    spec = VitSpec((8, 8), (4, 4), 1, 12, SPEC.blocks, num_classes=5, pool="avg")
    average = token_importance(to_torch(random_model(spec)), [images(8)])["blocks.1.fc2"]
    assert average[0] == pytest.approx(FLOOR)
    assert average[1:].min() > 0.5
    assert all(t.mean().item() == pytest.approx(1, abs=1e-5) for t in table.values())
    with pytest.raises(DataError, match="at least one image"):
        token_importance(to_torch(random_model()), [])


def test_importance_of_a_single_output_is_not_the_same_for_every_token():
    """One class leaves a softmax nothing to say; its gradient is 0 everywhere."""
    table = token_importance(to_torch(random_model(replace(SPEC, num_classes=1))), [images(8)])
    assert table["blocks.1.fc2"][0] > 4
    assert torch.allclose(table["blocks.1.fc2"][1:], torch.full((4,), FLOOR))


def test_importance_of_an_output_that_is_not_finite_is_refused():
    damaged = images(4)
    damaged[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="Activations must be finite"):
        token_importance(to_torch(random_model()), [damaged])


def test_importance_covers_every_linear_but_the_classifier():
    table = token_importance(to_torch(random_model()), [images(4)])
    assert {f"{n}.weight" for n in table} >= set(linears(SPEC)) - {"head.weight"}


def test_sampled_rows_follow_their_weights():
    rows, weight = np.arange(10_000, dtype=np.float32)[:, None], np.ones(10_000)
    weight[:100] = 99.0
    picked = sample_rows(rows, weight, outputs=1)
    assert np.mean(picked < 100) == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(sample_rows(rows[:50], np.ones(50), outputs=1), rows[:50])


def test_fitted_grid_serves_the_output_not_the_input():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 4)).astype(np.float32)
    rows[:, 0] *= 100
    blind = np.diag([0.0, 1.0, 1.0, 1.0]).astype(np.float32)  # the layer does not read the large channel
    seeing = fit_grid(rows, 8, np.eye(4, dtype=np.float32), golden, asymmetric=False)
    assert fit_grid(rows, 8, blind, golden, asymmetric=False).scale < 0.2 * seeing.scale
    positive = fit_grid(np.abs(rows), 8, blind, golden, asymmetric=True)
    assert positive.zero_point != 0
    assert fit_grid(np.zeros((3, 4), np.float32), 8, blind, golden, asymmetric=True).scale == 1


# --------------------------------------------------------------------------- the sequential pass


CALIBRATION, HELD_OUT = [images(40, 1), images(40, 2)], torch.from_numpy(images(100, 3))


def error(model: Model, refined) -> float:
    exact = to_torch(model)(HELD_OUT)
    return (
        (simulate(refined.model, refined.quantization)(HELD_OUT) - exact).square().sum() / exact.square().sum()
    ).item()


def test_refine_beats_rounding_on_images_it_never_saw():
    model = random_model()
    importance = token_importance(to_torch(model), CALIBRATION)
    grid = QuantizeConfig("w4a8", asymmetric=("fc2",))
    plain = error(model, refine(model, CALIBRATION, RefineConfig(grid, dampings=(), rounding=nearest), {}))
    full = refine(model, CALIBRATION, RefineConfig(grid), importance)
    assert error(model, full) < 0.5 * plain
    assert {r.name for r in full.layers} == set(linears(SPEC))


@pytest.mark.parametrize("copies", [1, 3])
def test_one_image_leaves_the_classifier_whole(copies):
    """Its pooled features do not vary then, so nothing tells one grid of the classifier from another."""
    model, one = random_model(), np.repeat(images(1, 1), copies, axis=0)
    made = refine(model, [one], RefineConfig(QuantizeConfig("w8a8")), {})
    reach = 127 * made.quantization.weights["head.weight"].scale
    assert np.allclose(reach, np.abs(model.weights["head.weight"]).max(axis=1))
    assert error(model, made) < 0.1
    cut = made.quantization.weights["head.weight"]
    cut = replace(
        made.quantization, weights={**made.quantization.weights, "head.weight": replace(cut, scale=0.15 * cut.scale)}
    )
    assert error(model, replace(made, quantization=cut)) > 0.1  # the control: a seventh of that


def test_refined_weights_lie_on_their_grids_and_the_input_is_untouched():
    model = random_model()
    before = {n: w.copy() for n, w in model.weights.items()}
    result = refine(model, CALIBRATION, RefineConfig(QuantizeConfig("w4a8")), {})
    for name, q in result.quantization.weights.items():
        assert np.array_equal(fake_quant(result.model.weights[name], q), result.model.weights[name])
    assert set(result.quantization.activations) == set(linears(SPEC).values())
    assert all(np.array_equal(model.weights[n], w) for n, w in before.items())


def test_refine_of_nothing_quantized_changes_nothing():
    model = random_model()
    result = refine(model, CALIBRATION, RefineConfig(QuantizeConfig(skip=("*",)), dampings=()), {})
    assert result.quantization.weights == result.quantization.activations == {}
    assert error(model, result) < 1e-9  # biases pass through float64 and back


def test_refine_refuses_what_it_cannot_do():
    model = random_model()
    with pytest.raises(DataError, match="at least one image"):
        refine(model, [], RefineConfig(), {})
    for wrong in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=rf"dampings must be positive and finite, got \({wrong},\)"):
            RefineConfig(dampings=(wrong,))
