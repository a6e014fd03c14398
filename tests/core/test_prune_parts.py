"""The pieces of `--pruner obs`, each against brute force or a slow NumPy reference."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.least_squares import CrossSum, Quadratic
from compressor.prune.allocate import Curve, allocate
from compressor.prune.mlp import PENDING, eliminate
from compressor.prune.qk import LogitMoments, reduce_logits
from compressor.prune.qk_norm import reduce_coordinates
from compressor.prune.regress import fold
from compressor.prune.sequential import SequentialPass
from compressor.prune.stream import TokenStream
from compressor.prune.surgery import opened, queries_keys
from compressor.prune.vo import block_diagonal, evened, reduce_values, remove_heads
from compressor.types import BlockSpec, VitSpec
from compressor.vit import Block

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def quadratic(size: int, outputs: int, seed: int = 0, rows: int | None = None) -> Quadratic:
    x = random(rows or 3 * size, size, seed=seed) @ random(size, size, seed=seed + 1)
    hessian = x.T @ x / len(x) + 1e-3 * torch.eye(size)
    return Quadratic(hessian, random(outputs, size, seed=seed + 2) @ hessian)


def minimum(q: Quadratic, kept: list[int]) -> float:
    """The least value of tr(W H W^T) - 2 tr(W R^T) over weights that read `kept`."""
    h, r = q.hessian[kept][:, kept].numpy(), q.cross[:, kept].numpy()
    return -float(np.trace(r @ np.linalg.solve(h, r.T))) if kept else 0.0


def test_eliminate_is_the_brute_force_greedy() -> None:
    q = quadratic(9, 4)
    alive, expected, costs = list(range(9)), [], []
    while len(alive) > 3:
        value = minimum(q, alive)
        cost = {u: minimum(q, [v for v in alive if v != u]) - value for u in alive}
        gone = min(cost, key=lambda u: cost[u])
        alive.remove(gone)
        expected.append(gone)
        costs.append(cost[gone])
    result = eliminate(q, 3)
    assert result.order.tolist() == expected and result.kept(9, 3).tolist() == alive
    np.testing.assert_allclose(result.added, costs, rtol=1e-6)


def test_eliminate_collects_removals_exactly() -> None:
    """More removals than are pending at once: the sum of the costs is the difference of two independent solves."""
    size = 2 * PENDING + 30
    q = quadratic(size, 5, rows=size // 2)  # rank-deficient but for the damping
    result = eliminate(q, 20)
    assert len(set(result.order.tolist())) == size - 20
    difference = minimum(q, result.kept(size, 20).tolist()) - minimum(q, list(range(size)))
    assert result.added.sum().item() == pytest.approx(difference, rel=1e-6)


def test_eliminate_takes_one_of_two_equal_units() -> None:
    x = random(200, 6)
    x[:, 5] = x[:, 2]
    hessian = x.T @ x / 200 + 1e-6 * torch.eye(6)
    result = eliminate(Quadratic(hessian, random(4, 6, seed=3) @ hessian), 4)
    assert (result.order[0].item() in (2, 5)) and result.added[0] < 1e-4 and result.added[1] > 1e-2


def sums(x: Tensor, t: Tensor, weight: Tensor | None = None) -> CrossSum:
    total = CrossSum(torch.full_like(x[0], 0.5), t.shape[1])
    total.add(x, t, torch.ones(len(x), dtype=x.dtype) if weight is None else weight)
    return total


def empty(x: Tensor, t: Tensor) -> CrossSum:
    return CrossSum(torch.full_like(x[0], 0.5), t.shape[1])


def test_fold_is_weighted_least_squares() -> None:
    x, t, weight, kept = random(80, 6) + 2, random(80, 3, seed=1), random(80, seed=2).square() + 0.1, [0, 2, 5]
    result = fold(sums(x, t, weight), empty(x, t), torch.zeros(3, 6, dtype=x.dtype), torch.tensor(kept), 1e-12)
    design = np.concatenate([x[:, kept].numpy(), np.ones((80, 1))], axis=1) * weight.sqrt().numpy()[:, None]
    expected = np.linalg.lstsq(design, t.numpy() * weight.sqrt().numpy()[:, None], rcond=None)[0]
    # The ridge is never below 1e-6 of the second moments, what float32 rows would need.
    np.testing.assert_allclose(result.weight, expected[:3].T, atol=1e-4)
    np.testing.assert_allclose(result.bias, expected[3], atol=1e-4)


def test_fold_over_two_sums_is_fold_over_all() -> None:
    x, t, anchor = random(50, 6), random(50, 3, seed=1), random(3, 6, seed=2)
    kept = torch.arange(4)
    whole = fold(sums(x, t), empty(x, t), anchor, kept, 1e-2)
    parts = fold(sums(x[:20], t[:20]), sums(x[20:], t[20:]), anchor, kept, 1e-2)
    torch.testing.assert_close(whole.weight, parts.weight)
    assert whole.error == pytest.approx(parts.error)


@given(
    rows=st.integers(1, 40),
    kept=st.integers(1, 12),
    damage=st.sampled_from(["none", "dead", "equal", "all dead"]),
    damping=st.sampled_from([None, 1e-6, 1e-3, 1.0]),
    seed=st.integers(0, 50),
)
@settings(max_examples=80, deadline=None)
def test_fold_is_never_worse_than_deleting(rows: int, kept: int, damage: str, damping: float | None, seed: int) -> None:
    """Fewer rows than inputs, dead and equal inputs: still finite, and at most the error of the dense weights cut down."""
    x, t, anchor = random(rows, 12, seed=seed), random(rows, 5, seed=seed + 1), random(5, 12, seed=seed + 2)
    x[:, {"none": slice(0), "dead": slice(2, 6), "equal": slice(0), "all dead": slice(None)}[damage]] = 1.0
    if damage == "equal":
        x[:, 6:] = x[:, :6]
    t = t * 0.1 + x @ anchor.T
    index = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:kept]
    held = slice(3, None, 4)
    fit = torch.ones(rows, dtype=torch.bool)
    fit[held] = False
    others = sums(x[held], t[held]) if rows > 3 else empty(x, t)
    result = fold(sums(x[fit], t[fit]), others, anchor, index, damping)
    assert torch.isfinite(result.weight).all() and torch.isfinite(result.bias).all()

    def loss(weight: Tensor, bias: Tensor) -> float:
        return (t - x[:, index] @ weight.T - bias).square().sum().item()

    cut = anchor[:, index]
    best_bias = (t - x[:, index] @ cut.T).mean(0)  # deleting and correcting the mean, the stronger rival
    assert loss(result.weight, result.bias) <= loss(cut, best_bias) * (1 + 1e-6) + 1e-9


def test_fold_raises_damping_when_sums_are_not_positive() -> None:
    x, t = random(30, 4), random(30, 2, seed=1)
    total = sums(x, t)
    total._gram._panels[0][0, 0] = -1.0  # what float32 noise does to a much larger matrix, exaggerated
    result = fold(total, empty(x, t), torch.zeros(2, 4, dtype=x.dtype), torch.arange(4), 1e-3)
    assert result.damping > 1e-3 and "too noisy" in result.fallback


def test_automatic_damping_falls_with_the_number_of_rows() -> None:
    chosen = []
    for rows in (16, 4000):
        x, noise = random(rows, 12, seed=1), random(rows, 5, seed=2)
        t = x @ random(12, 5, seed=3) + noise
        half = rows // 2
        anchor = random(12, 5, seed=3).T.contiguous() + 0.3 * random(5, 12, seed=4)
        chosen.append(fold(sums(x[:half], t[:half]), sums(x[half:], t[half:]), anchor, torch.arange(12), None).damping)
    assert chosen[0] > chosen[1]


def logit_data(images: int = 6, tokens: int = 30, width: int = 6) -> tuple[Tensor, Tensor]:
    """q, k (B, 2, T, D) with unequal spread and a mean per image."""
    scale = torch.linspace(0.1, 2, width, dtype=torch.float64)
    q = random(images, 2, tokens, width) @ random(width, width, seed=7) * scale + 1
    k = random(images, 2, tokens, width, seed=1) @ random(width, width, seed=8) * scale.flip(0)
    return q, k + 3 * random(images, 2, 1, width, seed=2)


def logit_error(q: Tensor, k: Tensor, fold_qk: Tensor) -> float:
    """Relative energy of q^T (I - P) k over all pairs of tokens of different images too, k centred per image."""
    k = k - k.mean(2, keepdim=True)
    rest = torch.eye(q.shape[-1], dtype=q.dtype) - fold_qk
    change, energy = 0.0, 0.0
    for head in range(2):
        a, b = q[:, head].flatten(0, 1), k[:, head].flatten(0, 1)
        change += (a @ rest[head] @ b.T).square().sum().item()
        energy += (a @ b.T).square().sum().item()
    return change / energy


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_reduce_logits_predicts_its_error_and_is_optimal(rank: int) -> None:
    q, k = logit_data()
    moments = LogitMoments(2, 6, CPU)
    moments.add(q[:2], k[:2], torch.ones(30, dtype=torch.float64))
    moments.add(q[2:], k[2:], torch.ones(30, dtype=torch.float64))
    reduced = reduce_logits(moments, rank)
    p = reduced.q @ reduced.k.mT
    assert torch.linalg.matrix_rank(p[0]).item() == rank
    assert reduced.errors[rank].item() == pytest.approx(logit_error(q, k, p), rel=1e-4)  # eigenvalues floored at 1e-6
    for seed in range(20):  # no nearby fold of that rank is better
        nudged = (reduced.q + 0.02 * random(*reduced.q.shape, seed=seed)) @ reduced.k.mT
        assert logit_error(q, k, nudged) > logit_error(q, k, p)
    coordinates = torch.diag((torch.arange(6) < rank).double()).repeat(2, 1, 1)
    assert logit_error(q, k, p) < logit_error(q, k, coordinates)


def test_reduce_logits_of_full_rank_changes_nothing() -> None:
    q, k = logit_data()
    moments = LogitMoments(2, 6, CPU)
    moments.add(q, k, torch.ones(30, dtype=torch.float64))
    reduced = reduce_logits(moments, 6)
    torch.testing.assert_close(reduced.q @ reduced.k.mT, torch.eye(6, dtype=torch.float64).repeat(2, 1, 1))
    dense, small = (x @ y.mT for x, y in ((q, k), (q @ reduced.q, (k - k.mean(2, keepdim=True)) @ reduced.k)))
    torch.testing.assert_close(dense.softmax(-1), small.softmax(-1))  # softmax does not see a constant per row


def test_reduce_coordinates_fits_the_norms() -> None:
    """The reported error is that of the block's own logits, and far below slicing the norm without a refit."""
    spec = BlockSpec(2, 8, 8, 8, qk_norm=True)
    torch.manual_seed(0)
    block = Block(spec, 16, 1e-6).requires_grad_(False)
    block.q_norm.weight.copy_(torch.tensor([2.0, 0.2, 1, 1.5, 0.1, 1, 0.3, 2]))
    block.k_norm.weight.copy_(torch.linspace(0.2, 2, 8))
    block.q_norm.bias.normal_()
    tokens = TokenStream(CPU)
    tokens.append(torch.randn(20, 30, 16))
    x = tokens[0]
    dense = [norm(part) for norm, part in zip((block.q_norm, block.k_norm), queries_keys(block, x), strict=True)]
    dense_block, w_q, b_q, w_k = deepcopy(block), block.q_norm.weight, block.q_norm.bias, block.k_norm.weight
    error = reduce_coordinates(block, 5, tokens, torch.ones(30))
    block.spec = BlockSpec(2, 5, 8, 8, qk_norm=True)
    small = queries_keys(block, x)

    def distance(q: Tensor, k: Tensor) -> float:
        change = energy = 0.0
        for head in range(2):
            a, b, c, d = (y[:, head].double() for y in (q, k, *dense))
            b, d = ((y - y.mean(1, keepdim=True)).flatten(0, 1) for y in (b, d))
            full = c.flatten(0, 1) @ d.T
            change += (a.flatten(0, 1) @ b.T - full).square().sum().item()
            energy += full.square().sum().item()
        return change / energy

    assert distance(block.q_norm(small[0]), block.k_norm(small[1])) == pytest.approx(error, rel=1e-3, abs=1e-5)
    # Negative control: a head-blind slice with the dense norms' weights, over every choice of coordinates.
    full, sliced = queries_keys(dense_block, x), []
    for chosen in combinations(range(8), 5):
        c = list(chosen)
        q, k = (F.layer_norm(part[..., c], (5,)) for part in full)
        sliced.append(distance(q * w_q[c] + b_q[c], k * w_k[c]))
    assert error < min(sliced) and error < 0.5 * np.median(sliced)


def test_reduce_values_keeps_what_is_written() -> None:
    q = quadratic(12, 7)  # 3 heads of 4
    basis, errors = reduce_values(q, 3, 4)
    weight = q.solve(block_diagonal(basis))
    assert weight is not None
    torch.testing.assert_close(weight @ block_diagonal(basis).mT, q.cross @ torch.linalg.inv(q.hessian))
    assert errors[4] < 1e-12 and (errors.diff() <= 1e-12).all() and errors[0] == pytest.approx(1)


def test_evened_features_are_of_one_size_and_span_what_they_did() -> None:
    """Control: of the basis itself, made for unit variance behind the attention, they are not; one that reads nothing stays."""
    heads, width, channels = 3, 8, 20
    weight = random(heads * width, channels)
    basis, _ = reduce_values(quadratic(heads * width, channels), heads, 4)
    basis[1, :, 2] = 0.0
    even = evened(basis, weight)
    rows = weight.reshape(heads, width, channels)

    def sizes(of: Tensor) -> Tensor:
        found: Tensor = (of.mT @ rows).norm(dim=2).flatten()
        return found[found > 0]

    assert torch.allclose(sizes(even), rows.norm(dim=2).square().mean().sqrt().expand(heads * 4 - 1))
    assert sizes(basis).max() > 2 * sizes(basis).min()
    scale = (even * basis).sum(1) / basis.square().sum(1).clamp(min=1e-12)  # (H, r): each only scaled
    assert torch.allclose(even, basis * scale[:, None]) and even[1, :, 2].eq(0).all()


def test_reduce_values_finds_a_low_rank() -> None:
    x = random(300, 8)
    hessian = x.T @ x / 300
    weight = torch.cat([random(5, 2, seed=1) @ random(2, 4, seed=2), random(5, 2, seed=3) @ random(2, 4, seed=4)], 1)
    q = Quadratic(hessian, weight @ hessian)
    basis, errors = reduce_values(q, 2, 2)
    fitted = q.solve(block_diagonal(basis))
    assert fitted is not None and errors[2] < 1e-12 < errors[1]
    torch.testing.assert_close(fitted @ block_diagonal(basis).mT, weight)


def test_remove_heads_is_the_brute_force_greedy() -> None:
    q, alive = quadratic(12, 3, seed=4), [0, 1, 2, 3]
    while len(alive) > 2:
        cost = {h: minimum(q, [3 * g + i for g in alive if g != h for i in range(3)]) for h in alive}
        alive.remove(min(cost, key=lambda h: cost[h]))
    assert remove_heads(q, 4, 2) == alive


def curve(block: int, width: str, values: list[float]) -> Curve:
    return Curve(block, width, torch.tensor(values, dtype=torch.float64))  # type: ignore[arg-type]


def test_allocate_is_the_best_of_all_sizes() -> None:
    spec = VitSpec((8, 8), (4, 4), 3, 8, (BlockSpec(1, 4, 4, 6), BlockSpec(1, 4, 4, 6)))
    curves = [
        curve(0, "mlp_dim", [9, 4.0, 2.5, 1.5, 0.7, 0.3, 0]),
        curve(1, "mlp_dim", [90, 8.0, 6.0, 4.1, 2.5, 1.1, 0]),
        curve(0, "qk_dim", [9, 3.0, 1.0, 0.2, 0]),
        curve(1, "qk_dim", [9, 0.3, 0.1, 0.04, 0]),
    ]

    def sized(a: int, b: int, c: int, d: int) -> VitSpec:
        return VitSpec((8, 8), (4, 4), 3, 8, (BlockSpec(1, c, 4, a), BlockSpec(1, d, 4, b)))

    def error(sizes: tuple[int, ...]) -> float:
        return sum(c.errors[s].item() for c, s in zip(curves, sizes, strict=True))

    every = list(product(range(1, 7), range(1, 7), range(1, 5), range(1, 5)))
    least = sized(1, 1, 1, 1).macs()
    for share in (0.9, 0.6, 0.4, 0.1):
        budget = least + share * (spec.macs() - least)
        chosen = allocate(spec, curves, VitSpec.macs, budget, 1)
        assert chosen.macs() <= budget
        a, b = chosen.blocks
        got = error((a.mlp_dim, b.mlp_dim, a.qk_dim, b.qk_dim))
        # Greedy on convex hulls is optimal for the budget it really uses.
        best = min(error(s) for s in every if sized(*s).macs() <= chosen.macs())
        assert got == pytest.approx(best)


def test_allocate_rounds_widths_to_multiples() -> None:
    spec = VitSpec((8, 8), (4, 4), 3, 8, (BlockSpec(1, 4, 4, 30),))
    curves = [curve(0, "mlp_dim", [float(30 - i) for i in range(31)])]
    chosen = allocate(spec, curves, VitSpec.macs, 0.9 * spec.macs(), 8)
    assert chosen.blocks[0].mlp_dim in (8, 16, 24)


@pytest.mark.parametrize(("width", "height", "between"), [(28, 0.3, 25), (35, 0.7, 28), (55, 0.3, 25)])
def test_allocate_walks_a_straight_curve_from_large_to_small(width: int, height: float, between: int) -> None:
    """Slopes that differ by rounding alone once put a smaller size before a larger one, which the spec then grew to."""
    spec = VitSpec((8, 8), (4, 4), 3, 8, (BlockSpec(1, 4, 4, width),))
    line = curve(0, "mlp_dim", (height * (1 - np.arange(width + 1) / width)).tolist())
    budget = replace(spec, blocks=(BlockSpec(1, 4, 4, between),)).macs()
    assert allocate(spec, [line], VitSpec.macs, budget, 1).blocks[0].mlp_dim == between
    assert allocate(spec, [line], VitSpec.macs, budget - 1, 1).blocks[0].mlp_dim < between  # the control


def test_what_linears_read_is_mapped_back_onto_the_dense_input() -> None:
    """A compressed stream with its channels in another order, which a norm does not mind, is undone exactly."""
    torch.manual_seed(0)
    block = Block(BlockSpec(2, 8, 8, 20), 12, 1e-6).requires_grad_(False)
    tokens, order = TokenStream(CPU), torch.randperm(12)
    for _ in range(3):
        tokens.append(torch.randn(5, 10, 12))
    run, small = SequentialPass(tokens, [torch.ones(10)], 1e-6), opened(block)
    assert run._align(small, small.norm1, ("q",)) == "" and small.q.weight is not block.q.weight
    torch.testing.assert_close(small.q.weight, block.q.weight, rtol=0, atol=0)  # nothing to undo yet
    for i in range(3):
        run.small[i] = tokens[i][..., order]
    run._apart = True
    run._align(small, small.norm1, ("q",))
    expected, got = block.q(block.norm1(run.dense[0])), small.q(small.norm1(run.small[0]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert (block.q(block.norm1(run.small[0])) - expected).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("limit", [0, 5 * 4 * 3 * 4, 1 << 20])
def test_token_stream_spills_and_reads_back(limit: int) -> None:
    stream, batches = TokenStream(CPU, limit), [torch.randn(5, 4, 3), torch.randn(5, 4, 3), torch.randn(2, 4, 3)]
    for batch in batches:
        stream.append(batch)
    stream[1] = batches[1] + 1
    twin = stream.copy()
    stream[0] = batches[0] * 0
    assert torch.equal(twin[0], batches[0]) and torch.equal(twin[1], batches[1] + 1) and len(twin) == 3
    assert [len(b) for b in stream.first(7)] == [5, 2] and torch.equal(stream.mapped(torch.neg)[2], -batches[2])
