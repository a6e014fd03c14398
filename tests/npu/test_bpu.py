"""RDK X5 through the vendor's mapper and simulator, on two blocks; O0 compiles in seconds, its latency is not looked at."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from compressor.errors import BundleError, ConfigError, ParityError, TargetUnavailable
from compressor.lower import lower
from compressor.types import BuildOptions
from targets import _choice, _estimate, _ranges, bpu
from targets._venv import Limits
from tests.npu.models import cosine, first_blocks, images, torch_logits, uneven

STATE = bpu.available()
needs_mapper = pytest.mark.skipif(not STATE.available, reason=f"{STATE.reason}; {STATE.fix}")

LOG = """\x1b[92mINFO\x1b[0m hbdk version 3.49.15
2026 INFO FPS=509.04, latency = 1964.5 us, DDR = 1329600 bytes   (see ./.hb_check/vitrim_subgraph_0.html)
2026 INFO FPS=7825.83, latency = 127.8 us, DDR = 676480 bytes   (see vitrim_subgraph_1.html)
Node                              ON   Subgraph  Type                Cosine Similarity  Threshold  DataType
-------------------------------------------------------------------------------------------------------------
patch.conv                        BPU  id(0)     HzSQuantizedConv    0.999870           4.53368      int8
blocks.0.softmax                  CPU  --        Softmax             --                 --         float
blocks.0.exp.flat                 BPU  id(1)     Reshape             0.999156           6.35496e+11  int16
"""


def test_the_mappers_table_and_latencies_are_read():
    model = first_blocks(1)
    found = bpu._parse(LOG, lower(model, bpu.CAPABILITIES), "bayes-e", "O2")
    assert [(op.name, op.placement, op.precision) for op in found.ops] == [
        ("patch.conv", "NPU", "int8"),
        ("blocks.0.softmax", "CPU", "float"),
        ("blocks.0.exp.flat", "NPU", "int16"),
    ]
    assert found.latency_ms == pytest.approx(2.0923) and len(found.subgraphs) == 2
    assert found.subgraphs[0] == {"name": "vitrim_subgraph_0", "latency_us": 1964.5, "ddr_bytes": 1329600}
    assert found.estimator == "HBDK 3.49.15 timing model, bayes-e at O2"
    macs = _estimate.macs_by_node(lower(model, bpu.CAPABILITIES))
    assert macs["patch.conv"] == 49 * 192 * 16  # of the nodes listed, only this one multiplies
    assert found.npu_mac_share == pytest.approx(macs["patch.conv"] / sum(macs.values()))
    assert found.to_json()["cpu_ops"] == [{"name": "blocks.0.softmax", "type": "Softmax"}]


def test_multiplies_are_counted_as_the_model_counts_them():
    """A head that reads all patches needs every token of every block; norms, softmax sums and zero-one halvings come on top."""
    model = first_blocks(2)
    spec = replace(model.spec, pool="avg")
    macs = _estimate.macs_by_node(lower(model.with_weights(spec, {}), bpu.CAPABILITIES))
    ours = sum(n for name, n in macs.items() if not name.endswith((".power.conv", ".halve0")))
    sums = sum(block.heads * (spec.tokens**2 + spec.tokens * spec.embed_dim) for block in spec.blocks)  # a row per head
    assert ours - sums == spec.macs() < sum(macs.values())


def test_a_log_without_a_table_is_an_error():
    with pytest.raises(TargetUnavailable, match="got no table"):
        bpu._parse("hbdk version 1", lower(first_blocks(1), bpu.CAPABILITIES), "bayes-e", "O2")


def test_wrong_options_are_refused_before_anything_starts(tmp_path):
    graph = lower(first_blocks(1), bpu.CAPABILITIES)
    with pytest.raises(ConfigError, match="at least one batch for target 'bpu'"):
        bpu.build(graph, BuildOptions(tmp_path, "w8a8"))
    with pytest.raises(ConfigError, match="must be one of bayes-e, bayes, bernoulli2, got 'x5'"):
        bpu.build(graph, BuildOptions(tmp_path, "w8a8", chip="x5"))
    with pytest.raises(ConfigError, match="must be one of w8a8, got 'fp32'"):
        bpu.build(graph, BuildOptions(tmp_path))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    model = first_blocks(2)
    options = BuildOptions(tmp_path_factory.mktemp("bpu"), "w8a8", calibration=(images(model, 20),))
    return model, bpu.compile_graph(lower(model, bpu.CAPABILITIES), options, "O0")


@needs_mapper
def test_the_whole_network_is_one_piece_on_the_chip(built):
    _, artifact = built
    found = _estimate.read(artifact)
    assert found.cpu_ops == () and len(found.subgraphs) == 1 and found.npu_mac_share == 1.0
    assert artifact.path.suffix == ".bin" and artifact.path.stat().st_size > 500_000


@needs_mapper
def test_the_simulated_chip_computes_the_model(built):
    model, artifact = built
    x = images(model, 24)[20:]  # not calibrated on
    session = bpu.open(artifact)
    got = session.run({"pixels": x})["logits"]
    assert got.shape == (4, 10) and cosine(got, torch_logits(model, x)) > 0.98  # int8 throughout
    assert cosine(got[::-1], torch_logits(model, x)) < 0.98  # control: other images' logits are further away
    assert session.ops({}) == session.estimate().ops


def compiled(artifact):
    text = artifact.path.with_name("model.build.log").read_text()
    return re.findall(r"onnx_model +: .*?([\w-]+)\.onnx", text)


def precisions(artifact, ending):
    return {op.precision for op in _estimate.read(artifact).ops if op.name.endswith(ending)}


@needs_mapper
def test_what_diverges_least_is_compiled(built):
    """Our grids here, in int8: 16 bits gain less than a fifth."""
    _, artifact = built
    told = re.findall(r"([\w-]+): divergence ([\d.e-]+), (\d+) of 20 classes agree", artifact.settings["measured"])
    assert [way for way, *_ in told] == ["vendor", "vitrim", *bpu.INT16] and float(told[1][1]) < float(told[0][1])
    assert (
        int(told[0][2]) >= 15
    )  # the mapper ends an Exp of values below zero at e^17, which rounds all of them to zero
    assert (artifact.settings["ranges"], artifact.settings["int16"]) == ("vitrim", "nothing")
    assert compiled(artifact) == ["vitrim"] and "int16" not in precisions(artifact, "")


@needs_mapper
def test_additions_are_in_16_bits_where_the_residual_stream_needs_them(built, tmp_path):
    """A few channels far above the others; control: `built`, whose own are even and stay int8."""
    model = uneven(built[0])
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 20),))
    artifact = bpu.compile_graph(lower(model, bpu.CAPABILITIES), options, "O0")
    assert (artifact.settings["ranges"], artifact.settings["int16"]) == ("vitrim", "norms and additions")
    assert compiled(artifact) == ["vitrim-norms-additions"] and _estimate.read(artifact).cpu_ops == ()
    assert precisions(artifact, (".attn", ".mlp")) == {"int16"} and precisions(artifact, ".fc1.conv") == {"int8"}
    x = images(model, 24)[20:]
    assert cosine(bpu.open(artifact).run({"pixels": x})["logits"], torch_logits(model, x)) > 0.98


@needs_mapper
def test_where_the_mappers_own_are_better_they_are_compiled(built, tmp_path, monkeypatch):
    model, _ = built
    monkeypatch.setattr(_choice, "best", lambda reference, ways, dear: ("vendor", ""))
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 4),))
    kept = bpu.compile_graph(lower(model, bpu.CAPABILITIES), options, "O0")
    assert (kept.settings["ranges"], kept.settings["int16"]) == ("vendor", "nothing")
    assert compiled(kept) == ["vendor"]


@needs_mapper
def test_a_chip_whose_compiler_fails_on_int16_additions_adds_in_int8(tmp_path):
    """Control: `built`, where they are measured."""
    model = first_blocks(1)
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 4),), chip="bernoulli2")
    artifact = bpu.compile_graph(lower(model, bpu.CAPABILITIES), options, "O0")
    assert artifact.settings["int16"] == "nothing" and "norms" not in artifact.settings["measured"]


@needs_mapper
def test_a_quantized_model_that_is_another_network_is_refused(built, tmp_path, monkeypatch):
    """Every grid ends at a hundredth of what is seen, in every way; control: `built`, with nothing changed."""
    model, artifact = built
    monkeypatch.setattr(_ranges, "attained", lambda ends, seen: {name: end / 100 for name, end in ends.items()})
    monkeypatch.setattr(
        _ranges, "thresholds", lambda graph, seen: {n: h.largest / 100 for n, h in seen.histograms.items()}
    )
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 20),))
    with pytest.raises(ParityError, match=r"at least 90% of the classes must be float's, got \d+ of 20 \(vendor: "):
        bpu.compile_graph(lower(model, bpu.CAPABILITIES), options, "O0")
    assert not list(tmp_path.glob("*.bin")) and artifact.path.is_file()


@needs_mapper
def test_a_damaged_artifact_is_refused(built):
    _, artifact = built
    with pytest.raises(BundleError, match="must have sha256"):
        bpu.open(replace(artifact, sha256="0" * 64))


@needs_mapper
def test_a_softmax_node_is_reported_as_what_fell_back(tmp_path):
    model = first_blocks(1)
    graph = lower(model, replace(bpu.CAPABILITIES, softmax="node", logits="matrix"))
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 2),))
    found = _estimate.read(bpu.compile_graph(graph, options, "O0"))
    assert {op.type for op in found.cpu_ops} == {"Softmax", "Reshape"} and len(found.subgraphs) == 2


@needs_mapper
def test_a_refusal_and_a_timeout_of_the_mapper_are_sentences(tmp_path, monkeypatch):
    model = first_blocks(1)
    options = BuildOptions(tmp_path, "w8a8", calibration=(images(model, 2),))
    with pytest.raises(
        TargetUnavailable, match=r"'quantize' must succeed, got ValueError: The opset .* is 18"
    ) as caught:
        bpu.compile_graph(lower(model, replace(bpu.CAPABILITIES, opset=18)), options, "O0")
    assert "opset 10 and 11" in caught.value.hint and "model.build.log" in caught.value.hint
    monkeypatch.setattr(bpu, "LIMITS", Limits(seconds=1))
    with pytest.raises(TargetUnavailable, match="no answer within 1 s"):
        bpu.compile_graph(lower(model, bpu.CAPABILITIES), options, "O0")
