"""What `vitrim inspect --target` says without a compiler, against what the compilers say where they are installed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import helper

import targets
from bench import npu
from compressor.errors import ConfigError
from compressor.lower import lower
from compressor.placement import place
from compressor.types import BlockSpec, BuildOptions, VitSpec
from targets import _estimate, bpu, qnn, rknn
from targets._constraints import check
from tests.cli.conftest import vitrim
from tests.models import random_model
from tests.npu.models import first_blocks, images

TARGETS = ("bpu", "qnn", "rknn")


def found(graph, name, chip=""):
    return [(f.op, f.name) for f in check(graph, targets.get(name).constraints(chip))]


def graph_of(nodes, shape, constants=(), opset=11):
    """A small graph ``x`` -> ``y``, for one rule."""
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in constants]
    ends = [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph(nodes, "one", *ends, weights)
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("chip", ["", "last"])
def test_nothing_is_known_against_what_is_emitted(name, chip):
    """For every chip but the two kinds that the vendors themselves restrict further."""
    chips = [c for c in targets.get(name).CHIPS if c not in ("bernoulli2", "rk3568", "rk3566")]
    placed = place(first_blocks(2), name, chips[-1] if chip else "")
    assert placed["unsupported"] == [] and placed["widths"] == [] and placed["operations"] > 50


def test_what_the_plain_export_leaves_to_the_cpu_is_named():
    """bench/results/npu.md, two blocks, plain: 2 Softmax and 1 Reshape on the BPU, 1 Reshape on RKNN, nothing on QNN."""
    model = first_blocks(2)
    plain = {opset: npu.export(model, opset) for opset in (11, 18)}
    assert found(plain[11], "bpu") == [
        ("Softmax", "/blocks/blocks.0/Softmax"),
        ("Softmax", "/blocks/blocks.1/Softmax"),
        ("Reshape", "/head/Gemm"),
    ]
    assert [op for op, _ in found(plain[18], "rknn")] == ["Reshape"]
    assert found(plain[18], "qnn") == []
    assert found(plain[18], "bpu")[0] == ("graph", "opset 18")


def test_the_token_graph_is_not_for_the_bpu():
    model = first_blocks(2)
    tokens = replace(bpu.CAPABILITIES, layout="tokens", patch="conv", softmax="node", logits="matrix")
    findings = check(lower(model, tokens), bpu.constraints())
    assert Counter(f.op for f in findings) == {"Softmax": 2, "Pad": 1, "Reshape": 1}
    assert all(f.reason and f.source for f in findings)
    assert "the mapper refuses" in next(f.reason for f in findings if f.op == "Pad")


def forms():
    """Forms that fall back somewhere, and ours: (target, chip, form)."""
    conv, tokens, one = bpu.CAPABILITIES, rknn.CAPABILITIES, qnn.CAPABILITIES
    yield "bpu", "", conv
    yield "bpu", "bayes", conv
    yield "bpu", "", replace(conv, softmax="node", logits="matrix")
    yield "rknn", "", replace(tokens, logits="matrix")
    yield "rknn", "", replace(conv, opset=18, softmax="node")
    yield "qnn", "", replace(one, gelu="erf")
    yield "qnn", "", replace(one, gelu="erf", opset=18)


@pytest.mark.parametrize(("name", "chip", "form"), list(forms()))
def test_the_compilers_agree(name, chip, form, tmp_path):
    target, model = targets.get(name), first_blocks(1)
    if not target.available().available:
        pytest.skip(f"{target.available().reason}; {target.available().fix}")
    graph, precision = lower(model, form), target.CAPABILITIES.precisions[0]
    options = BuildOptions(tmp_path, precision, calibration=(images(model, 4),), chip=chip)
    artifact = bpu.compile_graph(graph, options, "O0") if name == "bpu" else target.build(graph, options)
    on_cpu = [op.type for op in _estimate.read(artifact).cpu_ops]
    conversions = ("QuantizeLinear", "DequantizeLinear")  # around what fell back
    assert Counter(op for op, _ in found(graph, name, chip)) == Counter(op for op in on_cpu if op not in conversions)


def test_the_softmax_of_the_smaller_rockchips_is_named():
    graph = lower(first_blocks(2), rknn.CAPABILITIES)
    assert found(graph, "rknn", "rk3568") == [("Softmax", f"blocks.{i}.softmax") for i in range(2)]
    assert found(graph, "rknn", "rk3576") == []


def test_the_columns_of_an_image_on_the_smaller_rockchips_are_named():
    """Of one whose rows are a multiple of 16: another's graph has no such reshape."""
    model = random_model(VitSpec((32, 24), (8, 8), 3, 64, (BlockSpec(2, 32, 32, 64),)))
    graph = lower(model, rknn.CAPABILITIES)
    assert found(graph, "rknn", "rk3568") == [("Reshape", "patch.columns"), ("Softmax", "blocks.0.softmax")]
    assert found(graph, "rknn") == found(graph, "rknn", "rk3562") == []


def test_single_rules_hold_at_their_limit_and_not_before():
    def gather(rank):
        node = helper.make_node("Gather", ["x", "i"], ["y"], "g", axis=0)
        return found(graph_of([node], [2] * rank, [("i", np.array([0]))]), "bpu")

    def conv(channels, kernel):
        weight = np.zeros((8, channels, kernel, kernel), np.float32)
        node = helper.make_node("Conv", ["x", "w"], ["y"], "c", kernel_shape=[kernel, kernel])
        return found(graph_of([node], [1, channels, 64, 64], [("w", weight)]), "bpu")

    def pool(window):
        node = helper.make_node("MaxPool", ["x"], ["y"], "p", kernel_shape=[window, 1])
        return found(graph_of([node], [1, 8, 400, 8]), "bpu")

    assert [gather(rank) for rank in (4, 5)] == [[], [("Gather", "g")]]
    assert [conv(*size) for size in ((511, 8), (512, 8), (3, 32))] == [[], [("Conv", "c")], []]
    assert [pool(window) for window in (22, 197)] == [[], [("MaxPool", "p")]]
    unknown = graph_of([helper.make_node("Neg", ["x"], ["y"], "n")], [1, 8, 8, 8])
    assert found(unknown, "bpu") == [("Neg", "n")] and found(unknown, "qnn") == []
    assert found(graph_of([helper.make_node("Gelu", ["x"], ["y"], "e")], [1, 8, 8, 8], opset=20), "rknn") == [
        ("graph", "opset 20")
    ]


def test_constants_are_folded_before_they_are_judged():
    nodes = [helper.make_node("Neg", ["c"], ["d"], "folded"), helper.make_node("Mul", ["x", "d"], ["y"], "kept")]
    constant = ("c", np.ones((1, 8, 1, 1), np.float32))
    assert found(graph_of(nodes, [1, 8, 8, 8], [constant]), "bpu") == []
    nodes[0] = helper.make_node("Neg", ["x"], ["d"], "kept too")
    assert found(graph_of(nodes, [1, 8, 8, 8], [constant]), "bpu") == [("Neg", "kept too")]


def test_widths_that_the_chip_pads_are_listed():
    model = first_blocks(1)
    block = BlockSpec(3, 24, 64, 700)
    spec = replace(model.spec, blocks=(block,))
    sizes = {n: np.zeros(shape, np.float32) for n, shape in spec.shapes().items()}
    pruned = model.with_weights(spec, sizes)
    widths = place(pruned, "rknn")["widths"]
    assert [(w["name"], w["width"], w["padded"]) for w in widths] == [
        ("blocks.0.qk", 72, 96),
        ("blocks.0.mlp", 700, 704),
    ]
    assert widths[0]["multiple"] == 32 and "rknn-toolkit2 2.5.0" in widths[0]["source"]
    assert [w["name"] for w in place(pruned, "bpu")["widths"]] == ["blocks.0.mlp"]


def test_only_accelerators_have_tables():
    with pytest.raises(ConfigError, match=r"an accelerator with a compiler \(bpu, qnn, rknn\), got 'ort'"):
        place(first_blocks(1), "ort")
    with pytest.raises(ConfigError, match=r"chip of target 'rknn' must be one of rk3588, .*, got 'rk1'"):
        place(first_blocks(1), "rknn", "rk1")


def test_inspect_needs_no_vendor_tool(tmp_path):
    done = vitrim(
        "inspect", "demo", "--target", "rknn", "--chip", "rk3566", "--json", env={"XDG_DATA_HOME": str(tmp_path)}
    )
    assert done.code == 0, done.err
    assert done.json["params"] == 4_019_146 and done.json["target"] == "rknn"
    assert {f["op"] for f in done.json["unsupported"]} == {"Softmax"} and len(done.json["unsupported"]) == 9
    assert all(set(f) == {"op", "name", "reason", "source"} for f in done.json["unsupported"])
    wrong = vitrim("inspect", "demo", "--chip", "rk3566", "--json")
    assert wrong.code == 2 and "--chip must go with --target" in wrong.json["error"]["message"]
