"""The streamed statistics: against NumPy over activations held in full, and merge(a, b) == one pass over both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.moments import HistogramSum
from calibration.observe import ObservePlan, observe, token_index
from compressor.errors import ConfigError, DataError
from compressor.linalg import PANEL, GramSum
from compressor.types import BINS, LOW, PER_OCTAVE, BlockSpec, Statistics, VitSpec
from compressor.vit import VisionTransformer, build

SPEC = VitSpec((12, 12), (3, 3), 2, 12, (BlockSpec(2, 5, 4, 10), BlockSpec(3, 4, 6, 7, "swiglu")), num_classes=3)
EVERY = ObservePlan(tokens_per_image=None)


def network(spec: VitSpec = SPEC) -> VisionTransformer:
    torch.manual_seed(0)
    return build(spec)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 2, 12, 12)).astype(np.float32)


def held(module: VisionTransformer, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Every activation of the set at once: what `observe` must never need."""
    sites: dict[str, np.ndarray] = {}

    def tap(site: str, x: torch.Tensor) -> torch.Tensor:
        sites[site] = x.detach().double().numpy()
        return x

    module(torch.from_numpy(pixels), tap)
    return sites


def assert_equal(a: Statistics, b: Statistics, rtol: float) -> None:
    assert a.images == b.images
    for site, m in a.moments.items():
        assert m.count == b.moments[site].count
        for mine, other in ((m.sum, b.moments[site].sum), (m.outer, b.moments[site].outer)):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * float(m.outer.abs().max()))
    for block, energy in a.pair_energy.items():
        torch.testing.assert_close(energy, b.pair_energy[block], rtol=rtol, atol=0)
    for site, h in a.histograms.items():
        # A float32 value may differ in its last bit between batch shapes and so cross one bin edge.
        assert np.abs(h.counts - b.histograms[site].counts).sum() <= 4
        assert h.amax == pytest.approx(b.histograms[site].amax, rel=1e-6)
        assert h.negative == pytest.approx(b.histograms[site].negative, rel=1e-5)
    assert a.moments.keys() == b.moments.keys() and a.histograms.keys() == b.histograms.keys()


def test_observe_equals_numpy_over_held_activations() -> None:
    module, pixels = network(), images(5)
    stats, sites = observe(module, [pixels[:2], pixels[2:]], EVERY), held(module, pixels)
    for site in ("blocks.0.fc2", "blocks.1.fc2", "blocks.0.proj"):
        x = sites[site].reshape(-1, sites[site].shape[-1])
        # float32 activations multiplied in float32: 1e-5 of the sum's size.
        np.testing.assert_allclose(
            stats.moments[site].covariance, np.cov(x.T, bias=True), atol=1e-5 * np.abs(x).max() ** 2
        )
        np.testing.assert_allclose(stats.moments[site].mean, x.mean(0), atol=1e-5)
    q, k = sites["blocks.1.q"], sites["blocks.1.k"]  # (B, H, T, D)
    np.testing.assert_allclose(
        stats.moments["blocks.1.q"].second, np.einsum("bhtd,bhte->hde", q, q) / (5 * 17), atol=1e-5
    )
    np.testing.assert_allclose(stats.pair_energy["blocks.1"], (q**2 * k**2).sum((0, 2)), rtol=1e-5)


def test_observe_negative_control() -> None:
    """The comparison above would notice one changed image."""
    module, pixels = network(), images(5)
    changed = pixels.copy()
    changed[4] *= 1.5
    with pytest.raises(AssertionError):
        assert_equal(observe(module, [pixels], EVERY), observe(module, [changed], EVERY), 1e-5)


@given(split=st.integers(1, 5), batch=st.integers(1, 4), tokens=st.sampled_from([None, 1, 6]), seed=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_merge_equals_one_pass(split: int, batch: int, tokens: int | None, seed: int) -> None:
    module, pixels, plan = network(), images(6, seed), ObservePlan(tokens_per_image=tokens)
    a, b = observe(module, [pixels[:split]], plan), observe(module, [pixels[split:]], plan)
    together = observe(module, [pixels[i : i + batch] for i in range(0, 6, batch)], plan)
    assert_equal(a + b, together, 1e-5)  # float32 activations depend on the batch's shape in the last bit
    assert_equal(a + b, b + a, 1e-12)  # float64 addition


def test_histogram_bins_match_the_documented_edges() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(20_000).astype(np.float32))
    total = HistogramSum(x.device)
    total.add(x[:7000])
    total.add(x[7000:])
    result = total.result("site")
    edges = 2.0 ** (LOW + np.arange(BINS + 1) / PER_OCTAVE)
    exact, _ = np.histogram(np.abs(x.double().numpy()), edges)
    assert result.counts.sum() == 20_000
    # Codes are 2^-7 of a value wide, an edge is met within one code: 18 % of a bin at most.
    assert np.abs(np.cumsum(result.counts) - np.cumsum(exact)).max() <= 0.18 * exact.max()
    assert result.amax == float(x.abs().max()) and result.negative == float(x.min())


def test_histogram_holds_zero_tiny_and_huge() -> None:
    total = HistogramSum(torch.device("cpu"))
    total.add(torch.tensor([0.0, -0.0, 1e-30, 1.0, 3e38]))
    counts = total.result("site").counts
    assert counts[0] == 3 and counts[-1] == 1 and counts[-LOW * PER_OCTAVE] == 1


@pytest.mark.parametrize("width", [3, PANEL, PANEL + 7])
def test_gram_sum_is_the_product(width: int) -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((9, width)))
    total = GramSum((width,), x.device)
    total.add(x[:4])
    total.add(x[4:])
    torch.testing.assert_close(total.matrix(), x.T @ x)


@pytest.mark.parametrize(("limit", "count"), [(None, 17), (1, 2), (6, 6), (17, 17), (99, 17)])
def test_token_index_keeps_prefix_and_strides(limit: int | None, count: int) -> None:
    index = token_index(SPEC, limit)
    assert index[0] == 0 and len(index) == len(set(index)) == count and max(index) < SPEC.tokens
    assert max(np.diff(index[1:]), default=0) - min(np.diff(index[1:]), default=0) <= 1


def test_observe_reads_only_what_the_plan_names() -> None:
    plan = ObservePlan(moments=("fc2",), histograms=("head",), pair_energy=False)
    stats = observe(network(), [images(2)], plan)
    assert (
        stats.moments.keys() == {"blocks.0.fc2", "blocks.1.fc2"}
        and stats.histograms.keys() == {"head"}
        and not stats.pair_energy
    )


def test_observe_refuses_no_images() -> None:
    with pytest.raises(DataError, match="at least one image, got none"):
        observe(network(), [], EVERY)


def test_observe_refuses_nan_and_names_the_site() -> None:
    pixels = images(2)
    pixels[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"site 'blocks\.0\.q' must be finite"):
        observe(network(), [pixels], EVERY)


def test_plan_refuses_zero_tokens() -> None:
    with pytest.raises(ConfigError, match="tokens_per_image must be at least 1, got 0"):
        ObservePlan(tokens_per_image=0)
