"""`--pruner obs` end to end: exact recovery, what it must never do, its options, and the errors it raises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import data
from calibration.observe import ObservePlan, observe
from compressor import checkpoint
from compressor.errors import ConfigError, DataError
from compressor.prune import CorpConfig, ObsConfig, Pruned, configure, corp, obs, prune
from compressor.prune.importance import least_important, output_error, weight_entropy
from compressor.recipe import Recipe
from compressor.stages import prune_options
from compressor.types import BlockSpec, Model, Pool, VitSpec
from compressor.vit import to_torch
from tests.core.prunable import make, pixels, redundant


def run(model: Model, images: np.ndarray, config: ObsConfig) -> Pruned:
    return obs.prune(model, lambda: [images[i : i + 5] for i in range(0, len(images), 5)], config, "cpu")


def logits(model: Model, images: np.ndarray) -> torch.Tensor:
    return to_torch(model)(torch.from_numpy(images))


def test_recovery_is_exact_when_half_of_everything_is_redundant() -> None:
    model, test = redundant(64, {"q": 16, "k": 16, "v": 12}, mix=1.0), pixels(8, seed=9)
    result = run(model, pixels(60), ObsConfig(0.5, 0.5, 0.5))
    assert result.model.spec.blocks[0] == BlockSpec(2, 8, 6, 32)
    # Sums pass through float32 products (1e-7 each) and eigenvalues are floored at 1e-6 of their mean.
    assert output_error(logits(model, test), logits(result.model, test)) < 1e-6


def test_recovery_is_not_exact_below_the_rank() -> None:
    """Negative control: the same network cannot lose more."""
    model, test = redundant(64, {"q": 16, "k": 16, "v": 12}, mix=1.0), pixels(8, seed=9)
    result = run(model, pixels(60), ObsConfig(0.7, 0.7, 0.7))
    assert output_error(logits(model, test), logits(result.model, test)) > 1e-3


def test_nothing_to_do_returns_the_model() -> None:
    model = make(BlockSpec(2, 6, 6, 20))
    assert run(model, pixels(2), ObsConfig(width_multiple=8)).model is model


def test_a_ratio_that_rounding_cancels_is_reported() -> None:
    model = make(BlockSpec(2, 8, 8, 64))
    result = run(
        model, pixels(8), ObsConfig(mlp_ratio=0.5, qk_ratio=0.5, vo_ratio=0.5, head_ratio=0.3, width_multiple=16)
    )
    assert result.model.spec.blocks == (BlockSpec(2, 8, 8, 32),)
    whole = {r.part: (r.before, r.after, r.fallback) for r in result.blocks if "kept whole" in r.fallback}
    assert set(whole) == {"qk", "vo", "heads"} and len(result.blocks) == 4
    assert whole["qk"] == (8, 8, "kept whole: 0.5 of 8 is less than a step of 16")
    assert whole["heads"][2] == "kept whole: 0.3 of 2 is less than a step of 1"
    assert not run(model, pixels(8), ObsConfig(0.5, 0.5, 0.5, 0.5)).fallbacks  # the control


def test_model_is_not_changed() -> None:
    model = make(BlockSpec(2, 8, 8, 20), BlockSpec(2, 8, 8, 20))
    before = {n: w.copy() for n, w in model.weights.items()}
    run(model, pixels(6), ObsConfig(0.5, 0.5, 0.5, drop_blocks=1))
    assert all(np.array_equal(before[n], w) for n, w in model.weights.items())


def test_obs_beats_corp_on_images_neither_has_seen() -> None:
    model, seen, unseen = redundant_noise(), pixels(40), pixels(60, seed=9)
    dense = logits(model, unseen)
    ours = run(model, seen, ObsConfig(0.5, 0.5)).model
    stats = observe(to_torch(model), [seen], ObservePlan(tokens_per_image=None, histograms=()))
    theirs = corp.prune(model, stats, CorpConfig.fixed(0.5, 0.5)).model
    assert ours.spec == theirs.spec
    assert output_error(dense, logits(ours, unseen)) < 0.5 * output_error(dense, logits(theirs, unseen))


def redundant_noise() -> Model:
    """A network of 128 hidden units and 16 dimensions per head, redundant but not exactly."""
    rng = np.random.default_rng(3)
    model = make(*(BlockSpec(2, 16, 12, 128),) * 3)
    weights = {n: w.copy() for n, w in model.weights.items()}
    for name, w in weights.items():
        if name.endswith(("q.weight", "k.weight", "fc1.weight")):
            rank = w.shape[1] // 3
            low = rng.standard_normal((w.shape[0], rank)) @ rng.standard_normal((rank, w.shape[1])) / rank
            weights[name] = (low + 0.05 * w).astype(np.float32)
    return replace(model, weights=weights)


@pytest.mark.parametrize("pool", ["token", "avg", "token_dist", "token_avg"])
def test_every_pool_is_supported(pool: Pool) -> None:
    model = make(BlockSpec(2, 8, 8, 20), pool=pool)
    assert all(weight.mean() == pytest.approx(1) for weight in obs.token_weights(model.spec))
    assert torch.isfinite(logits(run(model, pixels(6), ObsConfig(0.5, 0.5, 0.5)).model, pixels(2))).all()


DAMAGES = ("none", "dead", "constant", "duplicated", "half", "silent")


def damaged(model: Model, damage: str) -> Model:
    weights = {n: w.copy() for n, w in model.weights.items()}
    for name, w in weights.items():
        part = name.split(".")[-2] if name.startswith("blocks") else ""
        if damage == "dead" and part in ("fc1", "q", "v"):
            w[: len(w) // 2] = 0
        if damage == "constant" and part in ("fc1", "k") and w.ndim == 2:
            w[:] = 0
        if damage == "duplicated" and part in ("fc1", "gate", "q", "k", "v"):
            w[:] = w[:1]
        if damage == "silent" and part in ("fc1", "q", "k", "v", "fc2"):
            w[:] = 0
        if damage == "half":
            w[:] = w.astype(np.float16).astype(np.float32)
    return replace(model, weights=weights)


@given(
    count=st.sampled_from([1, 2, 9]),
    damage=st.sampled_from(DAMAGES),
    kind=st.sampled_from(["gelu", "swiglu", "norm"]),
    damping=st.sampled_from(["auto", 1e-6, 1.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_poor_data_and_odd_weights_stay_finite(count: int, damage: str, kind: str, damping: float, seed: int) -> None:
    block = BlockSpec(3, 8, 8, 60, "swiglu" if kind == "swiglu" else "gelu", qk_norm=kind == "norm")
    model, images = damaged(make(block, replace(block, mlp_dim=33), seed=seed), damage), pixels(count, seed)
    result = run(model, images, ObsConfig(0.5, 0.5, 0.5, head_ratio=0.34, damping=damping))  # type: ignore[arg-type]
    assert torch.isfinite(logits(result.model, pixels(3, seed=8))).all()
    assert all(np.isfinite([r.predicted, r.measured]).all() and r.predicted >= 0 for r in result.blocks)


def after_block(model: Model, images: np.ndarray) -> torch.Tensor:
    """(images, T, C) behind the only block."""
    module = to_torch(model)
    return module.blocks[0](module.embed(torch.from_numpy(images))).double()


@given(
    count=st.sampled_from([1, 2, 9]),  # of 18 tokens each: one image has fewer tokens than there are hidden units
    damage=st.sampled_from(DAMAGES),
    kind=st.sampled_from(["gelu", "swiglu"]),
    damping=st.sampled_from(["auto", 1e-6, 1.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_never_worse_than_no_compensation(count: int, damage: str, kind: str, damping: float, seed: int) -> None:
    """On the calibration images themselves: at most the error of deleting the same units from the dense block."""
    model = damaged(make(BlockSpec(3, 8, 8, 60, kind), seed=seed), damage)  # type: ignore[arg-type]
    images, weight = pixels(count, seed), obs.token_weights(model.spec)[0].double()
    small = run(model, images, ObsConfig(0.5, damping=damping)).model  # type: ignore[arg-type]
    dense, row = after_block(model, images), "blocks.0.fc1.weight"
    distance = np.square(small.weights[row][:, None] - model.weights[row]).sum(2)
    for part in ("fc1.bias", "gate.weight", "gate.bias")[: 3 if kind == "swiglu" else 1]:
        a, b = (m.weights[f"blocks.0.{part}"].reshape(m.spec.blocks[0].mlp_dim, -1) for m in (small, model))
        distance += np.square(a[:, None] - b).sum(2)
    names = [n for n in model.weights if n.startswith(("blocks.0.fc1", "blocks.0.gate"))]
    kept, free = [], distance.copy()
    for unit in range(len(free)):  # which dense units are left; equal ones are interchangeable
        kept.append(int(free[unit].argmin()))
        free[:, kept[-1]] = np.inf
    cut = {n: model.weights[n][kept] for n in names}
    cut["blocks.0.fc2.weight"] = model.weights["blocks.0.fc2.weight"][:, kept]
    deleted = model.with_weights(small.spec, cut)
    ours, rival = (
        ((after_block(m, images) - dense).square().sum((0, 2)) * weight).sum().item() for m in (small, deleted)
    )
    assert ours <= rival * (1 + 1e-3) + 1e-9 * dense.square().sum().item()  # streams are float32


def test_one_image_says_that_nothing_was_held_out() -> None:
    result = run(make(BlockSpec(2, 8, 8, 20)), pixels(1), ObsConfig(0.5))
    assert result.fallbacks and all("too few images to hold some out" in f for f in result.fallbacks)
    assert not run(make(BlockSpec(2, 8, 8, 20)), pixels(8), ObsConfig(0.5)).fallbacks


def test_measured_error_is_the_distance_of_the_streams() -> None:
    model, images = make(BlockSpec(2, 8, 8, 20), BlockSpec(2, 8, 8, 20)), pixels(7)
    result = run(model, images, ObsConfig(0.5, 0.5))
    seen: list[torch.Tensor] = []
    for m in (model, result.model):
        module = to_torch(m)
        x = module.embed(torch.from_numpy(images))
        for block in module.blocks:
            x = block(x)
        seen.append(x.double())
    expected = (seen[0] - seen[1]).square().sum() / seen[0].square().sum()
    assert result.blocks[-1].part == "mlp" and result.blocks[-1].measured == pytest.approx(float(expected), rel=1e-3)


def test_head_ratio_removes_the_head_that_does_nothing() -> None:
    model = make(BlockSpec(3, 8, 8, 20), BlockSpec(3, 8, 8, 20))
    weights = {n: w.copy() for n, w in model.weights.items()}
    weights["blocks.0.proj.weight"][:, 8:16] = 0
    weights["blocks.1.proj.weight"][:, :8] = 0
    model = replace(model, weights=weights)
    result = run(model, pixels(40), ObsConfig(head_ratio=0.34))
    assert [b.heads for b in result.model.spec.blocks] == [2, 2]
    test = pixels(8, seed=9)
    assert output_error(logits(model, test), logits(result.model, test)) < 1e-6
    np.testing.assert_allclose(result.model.weights["blocks.0.q.weight"][8:], model.weights["blocks.0.q.weight"][16:])


def test_output_error_of_one_class_and_of_several() -> None:
    one = torch.arange(6.0)[:, None]
    assert output_error(one, one + 1) == pytest.approx(6 / 17.5)  # over the squared distances from the mean
    several = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert output_error(several, several + 1) < 1e-12 < output_error(several, 2 * several)


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("idle", [0, 1, 2])
def test_drop_blocks_drops_the_block_that_only_adds_a_constant(idle: int, classes: int) -> None:
    model = make(*(BlockSpec(2, 8, 8, 20),) * 3)
    head = {f"head.{kind}": model.weights[f"head.{kind}"][:classes] for kind in ("weight", "bias")}
    model = model.with_weights(replace(model.spec, num_classes=classes), head)
    weights = {n: w.copy() for n, w in model.weights.items()}
    for part in ("proj", "fc2"):
        weights[f"blocks.{idle}.{part}.weight"][:] = 0
        weights[f"blocks.{idle}.{part}.bias"][:] = 0.3
    model = replace(model, weights=weights)
    module = to_torch(model)
    assert list(least_important(module, module.embed(torch.from_numpy(pixels(6))), 1)) == [idle]
    result = run(model, pixels(60), ObsConfig(drop_blocks=1))
    assert len(result.model.spec.blocks) == 2 and [r.block for r in result.blocks if r.part == "block"] == [idle]
    test = pixels(8, seed=9)
    assert output_error(logits(model, test), logits(result.model, test)) < 1e-6


def test_dropping_a_block_that_works_is_reported_as_costly() -> None:
    result = run(make(*(BlockSpec(2, 8, 8, 20),) * 3), pixels(20), ObsConfig(drop_blocks=2))
    assert len(result.model.spec.blocks) == 1
    assert all(r.predicted > 1e-3 for r in result.blocks if r.part == "block")


def test_weight_entropy_is_lowest_for_a_constant_block() -> None:
    model = make(*(BlockSpec(2, 8, 8, 20),) * 3)
    weights = {n: np.full_like(w, 0.5) if n.startswith("blocks.1") else w for n, w in model.weights.items()}
    entropy = weight_entropy(replace(model, weights=weights))
    assert entropy[1] == 0 and min(entropy[0], entropy[2]) > 1


def test_importance_by_entropy_drops_the_block_of_two_weights_and_reports_its_cost() -> None:
    model = make(*(BlockSpec(2, 8, 8, 20),) * 4)
    matrices = [n for n, w in model.weights.items() if n.startswith("blocks.2") and w.ndim == 2]
    model = replace(model, weights=model.weights | {n: 0.5 * np.sign(model.weights[n]) for n in matrices})
    idle = {f"blocks.0.{part}.weight": 0 * model.weights[f"blocks.0.{part}.weight"] for part in ("proj", "fc2")}
    model = replace(model, weights=model.weights | idle)  # the one that the output would not miss
    dropped = {}
    for importance in ("output", "entropy"):
        config = ObsConfig(drop_blocks=1, importance=importance)  # type: ignore[arg-type]
        (report,) = (r for r in run(model, pixels(20), config).blocks if r.part == "block")
        dropped[importance] = (report.block, report.predicted > 1e-3)
    assert dropped == {"output": (0, False), "entropy": (2, True)}


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_target_is_met_and_nearly_used(kind: str) -> None:
    model = make(*(BlockSpec(2, 16, 16, 96),) * 2)
    result = run(model, pixels(10), configure("obs", {f"target_{kind}": 0.6}))  # type: ignore[arg-type]
    cost = {"macs": VitSpec.macs, "params": VitSpec.params}[kind]
    assert 0.57 < cost(result.model.spec) / cost(model.spec) <= 0.6


def test_target_with_a_width_multiple_and_a_dropped_block() -> None:
    model = make(*(BlockSpec(2, 16, 16, 96),) * 3)
    result = run(model, pixels(10), ObsConfig(target=("macs", 0.4), width_multiple=4, drop_blocks=1))
    assert result.model.spec.macs() <= 0.4 * model.spec.macs() and len(result.model.spec.blocks) == 2
    assert all(w % 4 == 0 for b in result.model.spec.blocks for w in (b.qk_dim, b.v_dim, b.mlp_dim))


@pytest.mark.parametrize("width", ["qk_dim", "v_dim", "mlp_dim"])
def test_target_leaves_a_width_of_one_and_takes_the_others(width: str) -> None:
    narrow = replace(BlockSpec(2, 8, 8, 20), **{width: 1})  # type: ignore[arg-type]
    model = make(narrow, BlockSpec(2, 8, 8, 20))
    result = run(model, pixels(8), ObsConfig(target=("macs", 0.8)))
    assert result.model.spec.macs() <= 0.8 * model.spec.macs()
    assert getattr(result.model.spec.blocks[0], width) == 1
    with pytest.raises(ConfigError, match="target must be reachable"):
        run(make(BlockSpec(1, 1, 1, 1)), pixels(8), ObsConfig(target=("macs", 0.8)))


def test_target_out_of_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target must be reachable, got [\d,]+ where the smallest sizes cost [\d,]+"):
        run(make(BlockSpec(2, 16, 16, 96)), pixels(5), ObsConfig(target=("macs", 0.01)))


def test_no_images_and_too_many_dropped_blocks_are_refused() -> None:
    model = make(BlockSpec(2, 8, 8, 20))
    with pytest.raises(DataError, match="at least one image, got none"):
        obs.prune(model, list, ObsConfig(0.5), "cpu")
    with pytest.raises(ConfigError, match="must leave at least one of 1 blocks, got 1"):
        run(model, pixels(2), ObsConfig(drop_blocks=1))


@pytest.mark.parametrize("part", ["q", "v", "fc1"])
def test_activations_that_overflow_are_refused(part: str) -> None:
    model = make(BlockSpec(2, 8, 8, 20))
    run(model, pixels(6), ObsConfig(0.5, 0.5, 0.5))  # the control: without the large weights it works
    huge = {**model.weights, f"blocks.0.{part}.weight": model.weights[f"blocks.0.{part}.weight"] * np.float32(1e38)}
    with pytest.raises(DataError, match="must be finite"):
        run(replace(model, weights=huge), pixels(6), ObsConfig(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratio": 1.0}, r"mlp_ratio must be in \[0, 1\), got 1\.0"),
        ({"head_ratio": -0.5}, r"head_ratio must be in \[0, 1\), got -0\.5"),
        ({"target_macs": 1.5}, r"target_macs must be in \(0, 1\), got 1\.5"),
        ({"target_macs": 0.5, "target_params": 0.5}, "target_macs and target_params must not be combined"),
        ({"target_macs": 0.5, "mlp_ratio": 0.5}, "target_macs must not be combined with ratios"),
        ({"importance": "size"}, "ObsConfig.importance must be one of entropy, output, got 'size'"),
        ({"drop_blocks": -1}, "drop_blocks must be at least 0, got -1"),
        ({"damping": -1.0}, r"damping must be auto or a positive number, got -1\.0"),
        ({"damping": "car"}, "damping must be auto or a positive number, got 'car'"),
        ({"width_multiple": -8}, "width_multiple must be at least 1, got -8"),
        ({"value_rows": 8, "width_multiple": 8}, "value_rows must be at least 0 and below width_multiple, got 8"),
        ({"ratio": 0.5}, "pruner 'obs' must not be given ratio, got 0.5"),
    ],
)
def test_configure_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("obs", options)


def test_prune_dispatches_on_the_configuration() -> None:
    model, images = make(BlockSpec(2, 8, 8, 20)), pixels(8)
    config = configure("obs", {"mlp_ratio": 0.5, "qk_ratio": 0.0, "vo_ratio": None})
    result = prune(model, lambda: [images], config, lambda module, batches: pytest.fail("obs takes its own sums"))
    assert result.model.spec.blocks[0].mlp_dim == 10


def test_values_are_a_row_short_of_a_multiple_for_chips_that_add_one() -> None:
    """So they run on whole lanes there, beside the ort that `compress` adds; another chip wants the multiple itself."""
    for targets, rows in ((("bpu", "ort"), 1), (("ort",), 0), (("bpu", "rknn", "ort"), 0)):
        assert prune_options(Recipe(targets=targets, vo_ratio=0.5))["value_rows"] == rows
    model = make(BlockSpec(2, 16, 16, 32))
    widths = [
        run(model, pixels(12), ObsConfig(vo_ratio=0.5, width_multiple=8, value_rows=rows)).model.spec.blocks[0].v_dim
        for rows in (0, 1)
    ]
    assert widths == [8, 7]


def test_pruned_values_share_a_grid_well() -> None:
    """Their scales do not change the network, but what one int8 grid for a whole layer's values does to it: embedded model."""
    model = checkpoint.load("demo")
    model = model.with_weights(replace(model.spec, blocks=model.spec.blocks[:2]), {})
    images = next(iter(data.batches(data.open_images("demo", limit=48), model.preprocess, 48)))

    def rounded(_: object, __: object, values: torch.Tensor) -> torch.Tensor:
        step = values.abs().max() / 127
        return (values / step).round() * step

    def outcome() -> tuple[np.ndarray, float]:
        module = to_torch(obs.prune(model, lambda: iter([images]), ObsConfig(vo_ratio=0.5), "cpu").model)
        want = module(torch.from_numpy(images)).numpy()
        for block in module.blocks:
            block.v.register_forward_hook(rounded)
        return want, float(np.square(module(torch.from_numpy(images)).numpy() - want).mean())

    even, error = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressor.prune.sequential.evened", lambda basis, weight: basis)
        uneven, rough = outcome()
    assert np.abs(even - uneven).max() < 1e-3 * np.abs(even).max()
    assert error < 0.1 * rough
