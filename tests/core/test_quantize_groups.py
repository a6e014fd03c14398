"""Weights alone on integer grids, in groups along a row: against one weight at a time, and controls that must fail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ConfigError
from compressor.quantize.grid import dequantize, fake_quant, fake_quant_torch, quantize, symmetric
from compressor.quantize.plan import GROUP, QuantizeConfig, linears, weight_grid
from compressor.quantize.plan import quantize as plan
from compressor.quantize.refine import RefineConfig, refine
from compressor.quantize.rounding import DAMPING, nearest, second_order
from compressor.quantize.simulate import simulate
from compressor.types import BlockSpec, Model, QParams, Statistics, VitSpec
from compressor.vit import to_torch
from tests.models import random_model

# Rows of 40 (a group and a quarter), 72, 64 and 10 inputs, as pruning leaves them.
SPEC = VitSpec((8, 8), (4, 4), 3, 40, (BlockSpec(2, 5, 5, 72), BlockSpec(2, 4, 32, 64, mlp="swiglu")), num_classes=5)
WEIGHT_ONLY = ("w8a32", "w4a32")


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    """(count, width) float32 whose size grows along a row, so that no two groups have the same range."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) * np.geomspace(1, 30, width)).astype(np.float32)


def minmax(weight: np.ndarray, bits: int, group: int) -> QParams:
    flat = weight.reshape(len(weight), -1)
    ends = [np.abs(flat[:, i : i + group]).max(axis=1) for i in range(0, flat.shape[1], group)]
    return symmetric(np.stack(ends, axis=1), bits, axis=0, group=group)


def slow_integers(weight: np.ndarray, scale: np.ndarray, bits: int, group: int) -> list[list[int]]:
    """One weight at a time: column j of a row has the scale number j // group."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [
        [min(max(round(float(w / scale[r, j // group])), low), high) for j, w in enumerate(row)]
        for r, row in enumerate(weight)
    ]


# --------------------------------------------------------------------------- grids


@given(st.integers(0, 999), st.sampled_from([4, 8]), st.integers(1, 50), st.integers(1, 16))
def test_each_weight_meets_the_scale_of_its_group(seed, bits, width, group):
    weight = rows(3, width, seed)
    q = minmax(weight, bits, group)
    assert q.scale.shape == (3, -(-width // group))
    integers = quantize(weight, q)
    assert integers.tolist() == slow_integers(weight, q.scale, bits, group)
    assert np.array_equal(dequantize(integers, q), fake_quant(weight, q))
    assert np.array_equal(fake_quant_torch(torch.from_numpy(weight), q).numpy(), fake_quant(weight, q))


def test_a_group_off_by_one_is_seen():
    weight = rows(3, 12)
    q = minmax(weight, 4, 4)
    assert quantize(weight, q).tolist() != slow_integers(weight, q.scale[:, [1, 2, 0]], 4, 4)


def test_groups_of_a_kernel_run_along_its_flattened_axes():
    kernel = rows(5, 48).reshape(5, 3, 4, 4)
    q = minmax(kernel, 4, 32)
    assert np.array_equal(fake_quant(kernel, q), fake_quant(kernel.reshape(5, 48), q).reshape(kernel.shape))


@pytest.mark.parametrize("bad", [{"group": 0}, {"axis": None}, {"scale": np.ones(3, np.float32)}])
def test_groups_that_make_no_sense_are_refused(bad):
    good = {"scale": np.ones((3, 2), np.float32), "zero_point": 0, "bits": 4, "axis": 0, "group": 4}
    QParams(**good)
    with pytest.raises(
        ConfigError, match=r"QParams.group must be positive, with axis 0 and scales \(rows, groups\), got"
    ):
        QParams(**(good | bad))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_is_searched_as_a_matrix_of_its_own(bits):
    weight, energy = rows(6, 40), np.random.default_rng(1).uniform(0.1, 9, 40)
    found = weight_grid(weight, bits, energy=energy, group=16)
    for k, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        alone = weight_grid(np.ascontiguousarray(weight[:, part]), bits, energy=energy[part])
        assert np.array_equal(found.scale[:, k], alone.scale)
    error = [
        np.square(fake_quant(weight, q) - weight) @ energy for q in (found, weight_grid(weight, bits, energy=energy))
    ]
    assert error[0].sum() < 0.5 * error[1].sum()  # what groups are for: the ranges differ thirtyfold


def test_a_group_pruned_to_zeros_stays_zero():
    weight = rows(4, 40)
    weight[:, 32:] = 0
    assert np.array_equal(fake_quant(weight, weight_grid(weight, 4, group=32))[:, 32:], weight[:, 32:])


# --------------------------------------------------------------------------- rounding


def slow_second_order(weight: np.ndarray, gram: np.ndarray, q: QParams) -> np.ndarray:
    """One weight at a time; after each, the best real values of the columns left, by solving their normal equations."""
    order = np.argsort(-np.diag(gram), kind="stable")
    h = gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    out = np.empty_like(weight)
    for r, row in enumerate(weight):
        left = row.copy()
        for n, j in enumerate(order):
            scale = float(q.scale[r, j // q.group])
            out[r, j] = np.clip(np.rint(left[j] / scale), q.qmin, q.qmax) * scale
            rest = order[n + 1 :]
            left[rest] += np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j] * (left[j] - out[r, j]))
            left[j] = out[r, j]
    return out


def gram(size: int, seed: int = 1) -> torch.Tensor:
    """Correlated, and its energies in no order."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, dtype=torch.float64, generator=g) * (0.3 + torch.rand(size, generator=g))
    return x.T @ x / len(x) + 0.3


def test_second_order_takes_scales_by_column_whatever_the_order():
    weight, h = torch.from_numpy(rows(5, 11).astype(np.float64)), gram(11)
    q = minmax(weight.numpy(), 4, 4)
    slow, plain = slow_second_order(weight.numpy(), h.numpy(), q), nearest(weight, h, q).numpy()
    error = [np.einsum("oi,ij,oj->o", d, h.numpy(), d) for d in (weight.numpy() - slow, weight.numpy() - plain)]
    assert (error[0] < error[1]).any()
    expected = np.where((error[0] < error[1])[:, None], slow, plain)
    assert np.allclose(second_order(weight, h, q).numpy(), expected, atol=1e-9)
    turned = slow_second_order(weight.numpy(), h.numpy(), QParams(q.scale[:, ::-1], 0, 4, 0, 4))  # control
    assert not np.allclose(turned, slow, atol=1e-2)


@given(st.integers(0, 999), st.sampled_from([4, 8]), st.integers(2, 150))
@settings(max_examples=15, deadline=None)
def test_second_order_with_groups_is_on_the_grid_and_never_worse(seed, bits, width):
    weight, h = torch.from_numpy(rows(4, width, seed).astype(np.float64)), gram(width, seed)
    q = minmax(weight.numpy(), bits, 32)
    fed, plain = second_order(weight, h, q), nearest(weight, h, q)
    error = [((w - weight) @ h * (w - weight)).sum(1) for w in (fed, plain)]
    assert (error[0] <= error[1]).all()
    assert np.allclose(fake_quant(fed.float().numpy(), q), fed.numpy(), rtol=1e-6)


# --------------------------------------------------------------------------- a model


def images(count: int, seed: int) -> np.ndarray:
    """Smooth random images, so that the network's inputs are correlated as real ones are."""
    rng = np.random.default_rng(seed)
    waves = np.stack(
        [np.outer(np.sin(k * np.arange(8) / 2 + p), np.cos(p * np.arange(8) / 3)) for k in (1, 2, 3) for p in (0, 1, 2)]
    )
    return np.einsum("nck,khw->nchw", rng.standard_normal((count, 3, 9)), waves).astype(np.float32)


CALIBRATION, HELD_OUT = [images(40, 1), images(40, 2)], torch.from_numpy(images(100, 3))


def error(model: Model, refined) -> float:
    exact = to_torch(model)(HELD_OUT)
    found = simulate(refined.model, refined.quantization)(HELD_OUT)
    return ((found - exact).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_refined_weights_lie_on_their_grids_and_no_activation_has_one(precision):
    model = random_model(SPEC)
    result = refine(model, CALIBRATION, RefineConfig(QuantizeConfig(precision)), {})
    assert result.quantization.activations == {} and set(result.quantization.weights) == set(linears(SPEC))
    for name, q in result.quantization.weights.items():
        weight = result.model.weights[name]
        width = weight[0].size
        assert q.scale.shape == ((len(weight), -(-width // GROUP)) if precision == "w4a32" else (len(weight),))
        assert np.array_equal(fake_quant(weight, q), weight)


def test_refine_of_groups_beats_rounding_on_images_it_never_saw():
    model = random_model(SPEC)
    grid = QuantizeConfig("w4a32")
    plain = refine(model, CALIBRATION, RefineConfig(grid, dampings=(), rounding=nearest), {})
    full, eight = (refine(model, CALIBRATION, RefineConfig(QuantizeConfig(p)), {}) for p in ("w4a32", "w8a32"))
    assert error(model, full) < 0.7 * error(model, plain)
    assert error(model, eight) < 0.05 * error(model, full)


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_a_plan_of_weights_alone_reads_no_statistics(precision):
    model = random_model(SPEC)
    grids = plan(model, Statistics(0, {}, {}, {}), QuantizeConfig(precision, skip=("head.weight",)))
    assert grids.activations == {} and set(grids.weights) == set(linears(SPEC)) - {"head.weight"}
    assert {q.bits for q in grids.weights.values()} == {int(precision[1])}
    exact, coarse = (f(HELD_OUT) for f in (to_torch(model), simulate(model, grids)))
    assert 0 < (coarse - exact).norm() < (0.3 if precision == "w4a32" else 0.02) * exact.norm()
