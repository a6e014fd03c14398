"""CORP against a slow NumPy reading of the paper, on models where recovery is exact, and its negative controls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from calibration.observe import ObservePlan, observe
from compressor.errors import ConfigError, UnsupportedModel
from compressor.prune import configure, corp, prune
from compressor.prune.corp import CorpConfig
from compressor.prune.rank import MLP_SALIENCIES, QK_SALIENCIES, split
from compressor.types import BlockSpec, Model, Moments, Statistics
from compressor.vit import to_torch
from tests.core import prunable
from tests.core.prunable import make, pixels

EVERY = ObservePlan(tokens_per_image=None, histograms=())


def statistics(model: Model, images: np.ndarray) -> Statistics:
    return observe(to_torch(model), [images], EVERY)


def logits(model: Model, images: np.ndarray) -> np.ndarray:
    return to_torch(model)(torch.from_numpy(images)).numpy()


def sites(model: Model, images: np.ndarray) -> dict[str, np.ndarray]:
    seen: dict[str, np.ndarray] = {}

    def tap(site: str, x: torch.Tensor) -> torch.Tensor:
        seen[site] = x.double().numpy()
        return x

    to_torch(model)(torch.from_numpy(images), tap)
    return seen


def slow_mlp(model: Model, x: np.ndarray, ratio: float) -> dict[str, np.ndarray]:
    """CORP's MLP step on hidden activations x (n, M), by the paper, unit by unit where that is clearer."""
    w1, b1, w2, b2 = (
        model.weights[f"blocks.0.{n}"].astype(np.float64) for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    units, n = x.shape[1], len(x)
    score = [np.mean(x[:, i] ** 2) * np.sqrt(np.sum(w1[i] ** 2)) * np.sqrt(np.sum(w2[:, i] ** 2)) for i in range(units)]
    gone = np.sort(np.argsort(score)[: min(int(units * ratio), units - 64)])
    kept = np.setdiff1d(np.arange(units), gone)
    mu, cov = x.mean(0), np.cov(x.T, bias=True)
    ss, p = cov[np.ix_(kept, kept)], len(kept)
    tr, tr2 = np.trace(ss), np.trace(ss @ ss)
    rho = min(1.0, ((1 - 2 / p) * tr2 + tr**2) / ((n + 1 - 2 / p) * (tr2 - tr**2 / p)))
    b = cov[np.ix_(gone, kept)] @ np.linalg.inv(ss + max(1e-3, rho * tr / p) * np.eye(p))
    c = mu[gone] - b @ mu[kept]
    return {
        "fc1.weight": w1[kept],
        "fc1.bias": b1[kept],
        "fc2.weight": w2[:, kept] + w2[:, gone] @ b,
        "fc2.bias": b2 + w2[:, gone] @ c,
    }


def slow_logits(q: np.ndarray, k: np.ndarray, ratio: float) -> np.ndarray:
    """The logit matrix CORP intends for one head, from unscaled q, k (n, D), by its Kronecker system and r^-0.5."""
    width = q.shape[1]
    gone = np.sort(np.argsort(np.mean(q**2 * k**2, axis=0))[: int(width * ratio)])
    kept = np.setdiff1d(np.arange(width), gone)
    qs, ks, r = q[:, kept], k[:, kept], len(kept)
    system = np.kron((ks.T @ ks).T, qs.T @ qs) + 1e-3 * np.eye(r * r)
    right = (qs.T @ q[:, gone]) @ (k[:, gone].T @ ks)
    m = np.linalg.solve(system, right.flatten(order="F")).reshape(r, r, order="F")
    t = np.eye(r) + m
    return qs @ ((t + t.T) / 2) @ ks.T * r**-0.5


def test_mlp_equals_slow_reference() -> None:
    model = make(BlockSpec(2, 12, 12, 130))
    result = corp.prune(model, statistics(model, pixels()), CorpConfig.released(mlp_ratio=0.4))
    expected = slow_mlp(model, sites(model, pixels())["blocks.0.fc2"].reshape(-1, 130), 0.4)
    for name, value in expected.items():
        # Statistics pass through float32 products and, as released, float32 storage.
        np.testing.assert_allclose(result.model.weights[f"blocks.0.{name}"], value, atol=2e-4)
    assert result.model.spec.blocks[0].mlp_dim == 78 and not result.fallbacks


def test_qk_equals_slow_reference() -> None:
    model = make(BlockSpec(2, 16, 12, 64))
    result = corp.prune(model, statistics(model, pixels()), CorpConfig.released(qk_ratio=0.5))
    dense, small = sites(model, pixels()), sites(result.model, pixels())
    for head in range(2):
        q, k = (dense[f"blocks.0.{n}"][:, head].reshape(-1, 16) for n in "qk")
        got = small["blocks.0.q"][:, head].reshape(-1, 8) @ small["blocks.0.k"][:, head].reshape(-1, 8).T
        expected = slow_logits(q * 16**0.5, k, 0.5)  # the paper's q has no scale inside; the canonical one has D^-0.5
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("change", [{"symmetrize": False}, {"keep_scale": True}])
def test_qk_reference_would_notice_another_choice(change: dict[str, bool]) -> None:
    model = make(BlockSpec(2, 16, 12, 64))
    result = corp.prune(model, statistics(model, pixels()), replace(CorpConfig.released(qk_ratio=0.5), **change))
    small, dense = sites(result.model, pixels()), sites(model, pixels())
    got = small["blocks.0.q"][:, 0].reshape(-1, 8) @ small["blocks.0.k"][:, 0].reshape(-1, 8).T
    expected = slow_logits(
        dense["blocks.0.q"][:, 0].reshape(-1, 16) * 4, dense["blocks.0.k"][:, 0].reshape(-1, 16), 0.5
    )
    assert np.abs(got - expected).max() > 0.05 * np.abs(expected).max()


def redundant() -> Model:
    """Half of the hidden units repeat the other half, half of the q/k dimensions are linear in the other half."""
    model = prunable.redundant(128, {"q": 16, "k": 16}, mix=0.2)
    weights = dict(model.weights)
    for i in range(2):  # ranked below their originals, yet they matter
        weights[f"blocks.{i}.fc2.weight"] = weights[f"blocks.{i}.fc2.weight"] * np.repeat([1, 0.3], 64).astype(
            np.float32
        )
    return replace(model, weights=weights)


def many(stats: Statistics) -> Statistics:
    """The same distribution seen 10^9 times as often, so that shrinkage (which falls with the count) vanishes."""
    moments = {s: Moments(m.count * 10**9, m.sum * 1e9, m.outer * 1e9) for s, m in stats.moments.items()}
    return replace(stats, moments=moments)


def test_recovery_is_exact_when_removed_units_are_functions_of_kept_ones() -> None:
    model = redundant()
    stats, test = statistics(model, pixels(40)), pixels(8, seed=9)
    # Ranked by weights alone, so that the repeats go and not the quiet originals.
    config = replace(CorpConfig.fixed(0.5, 0.5), saliency="weight_magnitude")
    result = corp.prune(model, many(stats), config)
    dense = logits(model, test)
    scale = np.abs(dense - dense.mean(0)).max()
    # float32 Gram products put a 1e-6 relative noise on the regressions; the damping floor is 1e-6 too.
    assert np.abs(logits(result.model, test) - dense).max() < 2e-3 * scale
    assert max(b.predicted for b in result.blocks) < 1e-6


def test_recovery_fails_without_compensation() -> None:
    """Negative control: deleting the same units and dimensions and nothing else is far off."""
    model, test = redundant(), pixels(8, seed=9)
    weights = dict(model.weights)
    for i in range(2):
        weights[f"blocks.{i}.fc2.weight"] = weights[f"blocks.{i}.fc2.weight"].copy()
        weights[f"blocks.{i}.fc2.weight"][:, 64:] = 0
    dense = logits(model, test)
    assert (
        np.abs(logits(replace(model, weights=weights), test) - dense).max() > 0.1 * np.abs(dense - dense.mean(0)).max()
    )


def test_predicted_mlp_error_is_the_error_on_the_same_images() -> None:
    model = make(BlockSpec(2, 12, 12, 130))
    result = corp.prune(model, statistics(model, pixels()), CorpConfig.fixed(mlp_ratio=0.45))
    a, b = (sites(m, pixels())["blocks.0.mlp"].reshape(-1, 24) for m in (model, result.model))
    assert result.blocks[0].predicted == pytest.approx(((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(), rel=1e-3)


def test_compensation_beats_deletion_at_equal_size() -> None:
    model = make(BlockSpec(2, 16, 12, 140), BlockSpec(2, 16, 12, 140))
    result = corp.prune(model, statistics(model, pixels(60)), CorpConfig.fixed(0.4, 0.25))
    assert result.model.spec.macs() < model.spec.macs()
    assert all(np.isfinite(w).all() for w in result.model.weights.values())
    assert all(b.predicted < 0.5 for b in result.blocks)


def test_small_blocks_keep_what_they_have() -> None:
    model = make(BlockSpec(2, 6, 6, 20))
    result = corp.prune(model, statistics(model, pixels()), CorpConfig.released(0.9, 0.9))
    assert result.model.spec.blocks[0] == model.spec.blocks[0]


def test_dead_and_constant_units_stay_finite() -> None:
    model = make(BlockSpec(2, 16, 12, 128))
    weights = {n: w.copy() for n, w in model.weights.items()}
    weights["blocks.0.fc1.weight"][:100] = 0
    weights["blocks.0.q.weight"][:], weights["blocks.0.q.bias"][:] = 0, 0
    model = replace(model, weights=weights)
    for config in (CorpConfig.released(0.5, 0.5), CorpConfig.fixed(0.5, 0.5)):
        result = corp.prune(model, statistics(model, pixels(1)), config)
        assert np.isfinite(logits(result.model, pixels(2))).all()


def test_qk_norm_is_refused_with_what_to_do() -> None:
    model = make(BlockSpec(2, 16, 12, 64, qk_norm=True))
    with pytest.raises(UnsupportedModel, match=r"blocks\.0: CORP's Q/K step") as caught:
        corp.prune(model, statistics(model, pixels()), CorpConfig.released(qk_ratio=0.5))
    assert "--pruner obs" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratio": 1.0, "qk_ratio": 0.0}, r"mlp_ratio must be in \[0, 1\), got 1.0"),
        ({"mlp_ratio": 0.0, "qk_ratio": -0.1}, r"qk_ratio must be in \[0, 1\), got -0.1"),
        ({"mlp_ratio": 0.5, "qk_ratio": 0.0, "saliency": "enrgy"}, "saliency must be one of .* got 'enrgy'"),
        ({"mlp_ratio": 0.5, "qk_ratio": 0.0, "sums": "bf16"}, "sums must be one of float32, float64, got 'bf16'"),
    ],
)
def test_config_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorpConfig(**options)  # type: ignore[arg-type]


def test_saliencies_are_pure_scores() -> None:
    energy, w_in, w_out = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]), torch.tensor([3.0, 0.1])
    scores = {name: f(energy, w_in, w_out).tolist() for name, f in MLP_SALIENCIES.items()}
    assert scores["energy"] == [1, 4] and scores["weight_magnitude"] == pytest.approx([6, 0.1])
    assert scores["energy_weightmagnitude"] == pytest.approx([6, 0.4])
    pair = torch.tensor([[5.0, 1.0]])
    assert QK_SALIENCIES["same_token"](pair, pair * 2, pair * 3) is pair
    assert QK_SALIENCIES["all_pairs"](pair, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist() == [[3, 8]]


def test_split_is_per_head_and_stable() -> None:
    kept, gone = split(torch.tensor([[1.0, 1.0, 1.0], [3.0, 2.0, 1.0]]), 2)
    assert kept.tolist() == [[1, 2], [0, 1]] and gone.tolist() == [[0], [2]]


def test_prune_runs_passes_and_measures() -> None:
    model, images = make(BlockSpec(2, 16, 12, 140), BlockSpec(2, 16, 12, 140)), pixels(10)
    config = configure("corp", {"mlp_ratio": 0.4, "qk_ratio": 0.25, "vo_ratio": 0.0})
    result = prune(model, lambda: [images[:6], images[6:]], config, partial(observe, plan=EVERY))
    direct = corp.prune(model, statistics(model, images), config)
    np.testing.assert_allclose(
        logits(result.model, images), logits(direct.model, images), atol=1e-4
    )  # batch shapes differ
    a, b = sites(model, images), sites(result.model, images)
    for report in result.blocks:
        site = f"blocks.{report.block}"
        parts = ("attn", "mlp") if report.part == "mlp" else ("attn",)
        dense, small = (s[site] + sum(s[f"{site}.{part}"] for part in parts) for s in (a, b))
        assert report.measured == pytest.approx(((dense - small) ** 2).sum() / (dense**2).sum(), rel=1e-3)


def test_configure_refuses_what_corp_leaves_alone() -> None:
    with pytest.raises(ConfigError, match=r"pruner must be one of .* got 'crop'"):
        configure("crop", {})
    with pytest.raises(ConfigError, match=r"pruner 'corp' must not be given vo_ratio, got 0\.5") as caught:
        configure("corp", {"vo_ratio": 0.5})
    assert caught.value.hint == "Use --pruner obs."
