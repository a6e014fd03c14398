"""The share of multiply-adds run in integers, from hand-made tables of nodes whose right answer is known."""

from dataclasses import replace

import pytest

from compressor.kernels import int8_share
from compressor.roofline import work
from compressor.types import BlockSpec, OpRecord, VitSpec

SPEC = VitSpec((8, 8), (4, 4), 3, 12, (BlockSpec(2, 4, 4, 24), BlockSpec(2, 4, 4, 16)), num_classes=5)
LINEARS = [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("q", "k", "v", "proj", "fc1", "fc2")] + ["patch", "head"]


def table(floats: tuple[str, ...] = ()) -> list[OpRecord]:
    """One product per linear, in int8 but for `floats`, with a quantize node before each and fused attention in float."""
    rows = []
    for name in LINEARS:
        rows.append(OpRecord(f"{name}.quantize", "QuantizeLinear", "CPU", "int8", 9.0))
        rows.append(OpRecord(f"{name}.matmul", "MatMul", "CPU", "fp32" if name in floats else "int8", 1.0))
    return rows + [OpRecord(f"blocks.{i}.attention", "MultiHeadAttention", "CPU", "fp32", 1.0) for i in (0, 1)]


def share(*places: tuple[int | None, str]) -> float:
    macs = {place: sizes[0] for place, sizes in work(SPEC).items()}
    return sum(macs[p] for p in places) / sum(macs.values())


def test_only_attention_is_float():
    found = int8_share(table(), SPEC)
    attention = share((0, "attention"), (1, "attention"))
    assert found["int8_mac_share"] == pytest.approx(1 - attention)
    assert [p["name"] for p in found["float_parts"]] == ["attention"]
    assert found["float_parts"][0]["mac_share"] == pytest.approx(attention)


def test_a_fused_attention_counts_each_product_by_its_width():
    spec = replace(SPEC, blocks=(BlockSpec(2, 3, 9, 24),) * 2)
    macs = {place: sizes[0] for place, sizes in work(spec).items()}
    attention = sum(macs[i, "attention"] for i in (0, 1)) / sum(macs.values())
    fused = [replace(op, precision="int8+bf16") if op.name.endswith("attention") else op for op in table()]
    found = int8_share(fused, spec)
    assert found["int8_mac_share"] == pytest.approx(1 - attention * 9 / 12)
    assert [(p["name"], p["precision"]) for p in found["float_parts"]] == [("attention", "bf16")]


def test_a_float_product_beside_an_integer_quantize_node_is_seen():
    found = int8_share(table(("blocks.1.fc2",)), SPEC)
    assert found["int8_mac_share"] == pytest.approx(1 - share((0, "attention"), (1, "attention"), (1, "fc2")))
    part = next(p for p in found["float_parts"] if p["name"] == "blocks.1.fc2")
    assert (part["precision"], part["reason"]) == ("fp32", "the runtime chose a float kernel")


def test_the_reason_is_the_plan_where_the_plan_says_so():
    found = int8_share(table(("head",)), SPEC, kept_float=("head",))
    assert next(p for p in found["float_parts"] if p["name"] == "head")["reason"] == "the plan: too sensitive"


def test_one_of_three_projections_in_float_counts_for_a_third():
    found = int8_share(table(("blocks.0.k",)), SPEC)
    whole = 1 - share((0, "attention"), (1, "attention"))
    assert found["int8_mac_share"] == pytest.approx(whole - share((0, "qkv")) / 3)


def test_without_a_table_nothing_is_claimed():
    assert int8_share([], SPEC) == {"int8_mac_share": None, "float_parts": []}


def test_weights_alone_in_integers_are_the_plan_and_no_integer_products():
    found = int8_share(table(tuple(LINEARS)), SPEC, kept_float=("head",), weight_only=True)
    reasons = {p["name"]: p["reason"] for p in found["float_parts"]}
    assert found["int8_mac_share"] == 0
    assert reasons["blocks.0.fc1"] == reasons["patch"] == "the plan: only the weights are integers"
    assert reasons["head"] == "the plan: too sensitive"


def test_eight_bit_floats_count():
    rows = [OpRecord(op.name, op.type, op.placement, op.precision.replace("int8", "fp8"), op.time_ms) for op in table()]
    assert int8_share(rows, SPEC) == int8_share(table(), SPEC)
