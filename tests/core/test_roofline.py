"""Folding per-node times onto blocks, and efficiency against a calculation by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import targets
from compressor.lower import lower
from compressor.roofline import Peaks, efficiency, fold, work
from compressor.types import BuildOptions, OpRecord
from tests.models import BASE, SPECS, random_model


def op(name: str, time_ms: float = 1.0, kind: str = "MatMul", precision: str = "fp32") -> OpRecord:
    return OpRecord(name, kind, "CPU", precision, time_ms)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("patch.conv", (None, "patch")),
        ("tokens.add", (None, "patch")),
        ("blocks.3.norm1", (3, "norm")),
        ("blocks.11.q.matmul", (11, "qkv")),
        ("blocks.0.qkv.split", (0, "qkv")),
        ("blocks.0.softmax", (0, "attention")),
        ("blocks.0.heads.transpose", (0, "attention")),
        ("blocks.0.proj.add", (0, "proj")),
        ("blocks.0.fc1.matmul/transpose_b", (0, "fc1")),
        ("blocks.0.gate.matmul", (0, "fc1")),
        ("blocks.0.act.erf", (0, "act")),
        ("blocks.0.fc2_quantized", (0, "other")),
        ("blocks.0.fc2.matmul_quant", (0, "fc2")),
        ("blocks.0.attn", (0, "residual")),
        ("head.matmul/MatMulAddFusion", (None, "head")),
        ("logits", (None, "head")),
    ],
)
def test_our_names_say_block_and_part(name: str, place: tuple[int | None, str]) -> None:
    (part,) = fold([op(name)])
    assert (part.block, part.part) == place


def test_nodes_a_runtime_named_itself_are_placed_by_their_neighbours() -> None:
    ops = [
        op("blocks.0.fc1.matmul"),
        op("BiasGelu_token_0", kind="BiasGelu"),
        op("blocks.0.mlp"),
        op("SkipLayerNormalization_2", kind="SkipLayerNormalization"),
    ]
    ops += [op("Constant_12", kind="Const"), op("blocks.1.q.matmul"), op("fused_9", kind="Reorder")]
    found = [(p.block, p.part) for p in fold(ops)]
    assert found == [(0, "fc1"), (0, "act"), (0, "residual"), (1, "norm"), (1, "qkv"), (1, "other")]


def test_fold_loses_no_time_and_names_the_slowest_precision() -> None:
    ops = [
        op("blocks.0.fc1.quantize", 1.0),
        op("blocks.0.fc1.matmul", 3.0, precision="int8"),
        op("x.y", 4.0),
        op("c", 9.0, kind="Const"),
    ]
    parts = fold(ops)
    assert sum(p.time_ms for p in parts) == 8.0  # a constant takes no time of its own
    assert sum(p.share for p in parts) == pytest.approx(1.0)  # three float64 divisions
    assert parts[0].precision == "int8"
    assert parts[0].share == 0.5


def test_fold_of_nothing_is_nothing() -> None:
    assert fold([]) == ()


@pytest.mark.parametrize("name", SPECS)
def test_work_adds_up_to_the_specs_multiplies(name: str) -> None:
    """`VitSpec.macs` counts every row of the last block; `work` only those that pooling reads, so it may be less, never more."""
    spec = SPECS[name]
    total = sum(macs for macs, _, _ in work(spec).values())
    if spec.pool in ("avg", "token_avg"):
        assert total == spec.macs()
    else:
        assert 0 < total < spec.macs() or len(spec.blocks) == 0


def test_work_of_every_weight_is_that_weight() -> None:
    todo, shapes = work(BASE), BASE.shapes()
    for i in range(len(BASE.blocks)):
        assert todo[i, "fc1"][1] == np.prod(shapes[f"blocks.{i}.fc1.weight"])
        assert todo[i, "proj"][1] == np.prod(shapes[f"blocks.{i}.proj.weight"])
        assert todo[i, "qkv"][1] == sum(np.prod(shapes[f"blocks.{i}.{p}.weight"]) for p in "qkv")
    assert todo[None, "patch"][1] == np.prod(shapes["patch.weight"])


def test_efficiency_is_the_roofline_over_the_time() -> None:
    macs, weights, activations = work(BASE)[0, "fc1"]
    parts = fold([op("blocks.0.fc1.matmul", 2.0), op("blocks.0.norm1", 1.0)])
    by_name = {p.part: p for p in efficiency(parts, BASE, Peaks({"fp32": macs / 1e-3}, 1e15))}
    assert by_name["fc1"].efficiency == pytest.approx(0.5)  # 1 ms at the peak, 2 ms measured; memory is no limit
    assert by_name["norm"].efficiency is None
    slow_memory = Peaks({"fp32": 1e15}, 4 * (weights + activations) / 0.5e-3)
    assert efficiency(parts, BASE, slow_memory)[1].efficiency == pytest.approx(0.25)  # 0.5 ms of bytes
    assert efficiency(parts, BASE, Peaks({"int8": 1e12}, 1e12))[1].efficiency is None  # no peak for this precision


def test_every_multiplication_of_a_real_session_is_found_again(tmp_path: Path) -> None:
    model, target = random_model(BASE), targets.get("ort")
    artifact = target.build(lower(model, target.CAPABILITIES), BuildOptions(tmp_path))
    pixels = np.zeros((1, BASE.in_chans, *BASE.image_size), np.float32)
    parts = fold(target.open(artifact).ops({artifact.inputs[0].name: pixels}))
    found = {(p.block, p.part) for p in parts}
    assert work(BASE).keys() <= found
    assert {(0, "norm"), (1, "norm"), (0, "act")} <= found
    lost = sum(p.share for p in parts if p.part == "other")
    assert lost < 0.5  # a few reshapes; were names not recognised it would be 1
