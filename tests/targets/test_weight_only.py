"""Weights alone in 8 or 4 bits: small files, the numbers of the simulation, and products of floats, on every CPU target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import targets
from compressor.errors import ConfigError
from compressor.lower import lower
from compressor.quantize import QuantizeConfig, quantize, simulate
from compressor.types import Artifact, BlockSpec, BuildOptions, Model, Precision, Quantization, Statistics, VitSpec
from tests.models import SPECS, linear_sites, random_model, random_pixels, torch_logits

NAMES = ("null", "openvino", "ort")
WEIGHT_ONLY: tuple[Precision, ...] = ("w8a32", "w4a32")
# As pruning leaves them: rows of 48, 96, 80 and 108 inputs (the last groups of two are shorter) and heads of unequal widths.
PRUNED = VitSpec((16, 16), (4, 4), 3, 96, (BlockSpec(4, 20, 20, 96), BlockSpec(3, 12, 36, 200)), num_classes=7)
LARGE = VitSpec((16, 16), (8, 8), 3, 256, (BlockSpec(4, 64, 64, 1024),), num_classes=64)
EXACT = 2e-5  # float32 sums in another order, of logits of order 2
PACKED = {"w8a32": "i8", "w4a32": "i4"}


def grids(model: Model, precision: Precision, skip: tuple[str, ...] = ()) -> Quantization:
    return quantize(model, Statistics(0, {}, {}, {}), QuantizeConfig(precision, skip))


def build(name: str, model: Model, folder: Path, precision: Precision, plan: Quantization | None) -> Artifact:
    target = targets.get(name)
    if not target.available().available:
        pytest.skip(f"{name} is not installed")
    return target.build(lower(model, target.CAPABILITIES, plan), BuildOptions(folder, precision, precision))


def run(artifact: Artifact, pixels: np.ndarray) -> np.ndarray:
    return targets.get(artifact.target).open(artifact).run({"pixels": pixels})["logits"]


def simulated(model: Model, plan: Quantization, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return simulate(model, plan)(torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", WEIGHT_ONLY)
@pytest.mark.parametrize("batch", [1, 3])
def test_artifact_computes_the_simulation(name, precision, batch, tmp_path):
    model, pixels = random_model(PRUNED), random_pixels(PRUNED, batch)
    plan = grids(model, precision)
    got = run(build(name, model, tmp_path, precision, plan), pixels)
    assert np.abs(got - simulated(model, plan, pixels)).max() < EXACT
    assert np.abs(got - torch_logits(model, pixels)).max() > 20 * EXACT  # control: the float model is told apart
    coarser = dict(plan.weights)
    q = coarser["blocks.1.fc2.weight"]
    coarser["blocks.1.fc2.weight"] = replace(q, scale=q.scale * np.float32(1.01))  # control: one grid, a percent wrong
    assert np.abs(got - simulated(model, replace(plan, weights=coarser), pixels)).max() > 5 * EXACT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["swiglu", "distilled", "qk_norm", "odd image"])
def test_every_kind_of_model_in_4_bits(name, spec, tmp_path):
    model = random_model(SPECS[spec])
    pixels, plan = random_pixels(model.spec), grids(model, "w4a32")
    got = run(build(name, model, tmp_path, "w4a32", plan), pixels)
    assert np.abs(got - simulated(model, plan, pixels)).max() < EXACT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_layers_left_in_float_stay_so(name, precision, tmp_path):
    model, pixels = random_model(PRUNED), random_pixels(PRUNED)
    plan = grids(model, precision, skip=("blocks.0.*", "head.weight"))
    got = run(build(name, model, tmp_path, precision, plan), pixels)
    assert np.abs(got - simulated(model, plan, pixels)).max() < EXACT


def test_three_projections_in_one_product(tmp_path):
    """q, k and v side by side, and so their scales."""
    model, pixels = random_model(PRUNED), random_pixels(PRUNED)
    ort = targets.get("ort")
    for precision in WEIGHT_ONLY:
        plan = grids(model, precision)
        graph = lower(model, replace(ort.CAPABILITIES, qkv="packed"), plan)
        assert "blocks.0.qkv.matmul" in {node.name for node in graph.graph}
        got = run(ort.build(graph, BuildOptions(tmp_path, precision, precision)), pixels)
        assert np.abs(got - simulated(model, plan, pixels)).max() < EXACT


@pytest.mark.parametrize("name", ["openvino", "ort"])
def test_files_are_as_small_as_their_bits(name, tmp_path):
    model = random_model(LARGE)
    sizes = {}
    for precision in ("fp32", *WEIGHT_ONLY):
        artifact = build(name, model, tmp_path, precision, None if precision == "fp32" else grids(model, precision))
        sizes[precision] = artifact.files[-1].stat().st_size  # of OpenVINO's two, the one with the weights
    assert sizes["w8a32"] < 0.3 * sizes["fp32"]
    assert sizes["w4a32"] < 0.19 * sizes["fp32"]  # 4 bits, and a float32 scale for 32 of them: 5 of 32 bits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_same_plan_same_bytes(name, precision, tmp_path):
    model = random_model(PRUNED)
    first, second = (build(name, model, tmp_path / part, precision, grids(model, precision)) for part in "ab")
    assert first.sha256 == second.sha256 and first.precision == precision


@pytest.mark.parametrize("name", ["openvino", "ort"])
@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_products_are_of_floats(name, precision, tmp_path):
    model, pixels = random_model(PRUNED), random_pixels(PRUNED, 1)
    artifact = build(name, model, tmp_path, precision, grids(model, precision))
    records = targets.get(name).open(artifact).ops({"pixels": pixels})
    products = [r for r in records if r.type in ("MatMul", "Gemm", "FusedMatMul", "FullyConnected")]
    assert len(products) >= len(linear_sites(PRUNED)) and {r.precision for r in products} == {"fp32"}
    unpacked_each_time = {"DequantizeLinear", "MatMulNBits", "Convert"} & {r.type for r in records}
    assert not unpacked_each_time


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_openvino_keeps_weights_packed_in_memory(precision, tmp_path):
    openvino = pytest.importorskip("openvino")
    model = random_model(LARGE)
    artifact = build("openvino", model, tmp_path, precision, grids(model, precision))
    read = openvino.Core().read_model(artifact.path)
    read.reshape([1, 3, 16, 16])
    executed = openvino.Core().compile_model(read, "CPU", dict(artifact.settings)).get_runtime_model().get_ordered_ops()
    products = [node for node in executed if node.rt_info["layerType"].astype(str) == "FullyConnected"]
    stored = {node.get_friendly_name(): node.input(1).get_element_type().get_type_name() for node in products}
    assert len(stored) == len(linear_sites(LARGE))
    classifier = stored.pop("logits")  # OpenVINO 2026.4 unpacks the rows of 8 bits there, and there only
    assert set(stored.values()) == {PACKED[precision]} and classifier in ("f32", PACKED[precision])


def test_4_bits_are_standard_onnx(tmp_path):
    model = random_model(PRUNED)
    artifact = build("ort", model, tmp_path, "w4a32", grids(model, "w4a32"))
    proto = onnx.load(artifact.path)
    assert proto.opset_import[0].version >= 21
    kinds = {i.name: i.data_type for i in proto.graph.initializer if i.name.endswith(".weight") and len(i.dims) > 1}
    assert len(kinds) == len(linear_sites(PRUNED)) and set(kinds.values()) == {onnx.TensorProto.INT4}
    float_ = onnx.load(build("ort", model, tmp_path, "fp32", None).path)
    assert float_.opset_import[0].version == targets.get("ort").CAPABILITIES.opset  # control: nothing else moves


def test_groups_need_a_matrix_for_the_patches():
    model = random_model(PRUNED)
    form = replace(targets.get("openvino").CAPABILITIES, patch="conv")
    with pytest.raises(ConfigError, match="grouped weights must be 'unshuffle', got 'conv'"):
        lower(model, form, grids(model, "w4a32"))
    assert lower(model, form, grids(model, "w8a32"))
