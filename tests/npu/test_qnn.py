"""Qualcomm HTP through ONNX Runtime's QNN compiler and emulator, on one block."""

from __future__ import annotations

import pytest

from compressor.errors import ConfigError
from compressor.lower import lower
from compressor.types import BuildOptions
from targets import _estimate, qnn
from tests.npu.models import cosine, first_blocks, images, torch_logits

STATE = qnn.available()
needs_compiler = pytest.mark.skipif(not STATE.available, reason=f"{STATE.reason}; {STATE.fix}")


def build(tmp_path, precision):
    model = first_blocks(1)
    options = BuildOptions(tmp_path, precision, calibration=(images(model, 20),), chip="sm8550")
    return model, qnn.build(lower(model, qnn.CAPABILITIES), options)


def test_wrong_options_are_refused_before_anything_starts(tmp_path):
    graph = lower(first_blocks(1), qnn.CAPABILITIES)
    with pytest.raises(ConfigError, match="at least one batch for target 'qnn'"):
        qnn.build(graph, BuildOptions(tmp_path, "w8a16"))
    with pytest.raises(ConfigError, match=r"must be one of sm8650, .*, got 'snapdragon'"):
        qnn.build(graph, BuildOptions(tmp_path, "w8a16", chip="snapdragon"))


@needs_compiler
@pytest.mark.parametrize(("precision", "close"), [("w8a16", 0.9999), ("w8a8", 0.99)])
def test_one_context_holds_the_network_and_computes_it(tmp_path, precision, close):
    model, artifact = build(tmp_path, precision)
    found = _estimate.read(artifact)
    assert len(found.subgraphs) == 1 and found.cpu_ops == () and found.npu_mac_share == 1.0
    assert found.latency_ms is None and "emulator" in found.leaves_out
    x = images(model, 24)[20:]  # not calibrated on
    got = qnn.open(artifact).run({"pixels": x})["logits"]
    want = torch_logits(model, x)
    assert cosine(got, want) > close and cosine(got[::-1], want) < close


def test_what_stays_outside_the_contexts_is_reported():
    graph = lower(first_blocks(1), qnn.CAPABILITIES)
    quantized = [["patch.conv", "Conv"], ["q", "QuantizeLinear"], ["blocks.0.act.erf", "Erf"]]
    nodes = [["c0", "EPContext"], ["blocks.0.act.erf", "Erf"], ["c1", "EPContext"]]
    found = qnn._placement({"nodes": nodes, "quantized": quantized, "precision": "w8a16"}, graph, "sm8550")
    assert [(op.name, op.placement) for op in found.ops] == [("patch.conv", "NPU"), ("blocks.0.act.erf", "CPU")]
    assert len(found.subgraphs) == 2 and 0 < found.npu_mac_share < 1
