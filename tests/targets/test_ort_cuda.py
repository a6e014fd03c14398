"""ONNX Runtime on a GPU: what it is asked for, and that it never becomes the CPU unnoticed. Runs on a GPU in test_conformance."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import targets
from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.lower import lower
from compressor.types import Artifact, BuildOptions, Precision
from targets import _tensorrt, ort, ort_cuda
from tests.targets.networks import PLAIN, grids, model, pixels

STATE = ort_cuda.available()
HERE = pytest.mark.skipif(STATE.available, reason="a GPU is here: test_conformance runs on it")


def built(folder: Path, precision: Precision = "fp32") -> Artifact:
    network = model(PLAIN)
    plan = grids(network) if precision == "w8a8" else None
    return ort_cuda.build(lower(network, ort_cuda.CAPABILITIES, plan), BuildOptions(folder, precision, precision))


@HERE
def test_absence_is_explained():
    assert "CUDA" in STATE.reason and "onnxruntime-gpu" in STATE.fix + ort_cuda.FIX
    assert _tensorrt.gpus() == 0 or "built without" in STATE.reason


@HERE
def test_open_names_the_reason(tmp_path):
    with pytest.raises(TargetUnavailable, match="CUDA") as caught:
        ort_cuda.open(built(tmp_path))
    assert caught.value.hint == STATE.fix


@HERE
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnx_runtime_does_not_become_the_cpu(provider, tmp_path):
    """ONNX Runtime itself, asked for a provider that it does not have."""
    made = built(tmp_path)
    asked = replace(made, settings={"provider": provider})
    with pytest.raises(TargetUnavailable, match="must run every node on the GPU"):
        ort_cuda.session(asked, 1)
    onnx_runtime = ort.OrtSession(made, 1)  # control: the file is one that it runs
    assert onnx_runtime.run({"pixels": pixels(PLAIN)})["logits"].shape == (4, 10)


def test_cpu_beside_a_gpu_provider_is_allowed_only_when_it_is_asked_for(tmp_path):
    made, images = built(tmp_path), {"pixels": pixels(PLAIN)}
    expected = ort.OrtSession(made, 1).run(images)["logits"]
    if not STATE.available:
        both = ort.OrtSession(
            made, 1, (*ort_cuda.providers(made), ort.CPU)
        )  # the fallback that the target does without
        assert np.array_equal(both.run(images)["logits"], expected)
    with pytest.raises(BundleError, match="accepts"):
        ort.OrtSession(made, 1, (("NoSuchExecutionProvider", {}),))


def test_providers_are_in_order_and_never_the_cpu(tmp_path):
    made = built(tmp_path, "fp16")
    assert ort_cuda.providers(made) == (("CUDAExecutionProvider", {"use_tf32": "0"}),)
    first, second = ort_cuda.providers(replace(made, settings={"provider": "tensorrt"}))
    assert first == ("TensorrtExecutionProvider", {"trt_fp16_enable": "1", "trt_int8_enable": "0"})
    assert second[0] == "CUDAExecutionProvider"
    whole = replace(made, precision="fp32", settings={"provider": "tensorrt"})
    assert ort_cuda.providers(whole)[0][1] == {"trt_fp16_enable": "0", "trt_int8_enable": "0"}


@HERE
def test_providers_that_are_not_there_are_not_raced(tmp_path):
    made = built(tmp_path)
    assert (
        "tensorrt" not in {v.settings["provider"] for v in targets.variants("ort-cuda", made)} or _tensorrt.gpus() == 0
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8"])
def test_file_computes_the_model(precision, tmp_path):
    """The CPU reads the very file a GPU would get."""
    images = {"pixels": pixels(PLAIN)}
    graph = lower(model(PLAIN), ort.CAPABILITIES)
    exact = ort.OrtSession(ort.build(graph, BuildOptions(tmp_path, name="exact")), 1).run(images)["logits"]
    got = ort.OrtSession(built(tmp_path, precision), 1).run(images)["logits"]
    limit = {"fp32": 1e-5, "fp16": 1e-2, "w8a8": 0.2}[precision]
    assert np.linalg.norm(got - exact) < limit * np.linalg.norm(exact)


def test_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'ort-cuda'.*got 'bf16'"):
        built(tmp_path, "bf16")
