"""The torch simulation and the integer graph round the same numbers to the same integers, on the demo's golden inputs.

Rounding is chaotic: where the order of a float sum moves one value across a rounding boundary, everything behind it moves
a little too, and after nine blocks a seventh of all integers differ by one. Comparing only final logits would therefore
need a loose tolerance. Here the simulation is given the integers the runtime produced at every site it has passed, so each
site is compared on equal inputs and the tolerance is one quantization step, with almost all integers equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import targets
from calibration.data import batches, open_images
from calibration.observe import ObservePlan, observe
from compressor.checkpoint import load
from compressor.lower import lower
from compressor.quantize import QuantizeConfig, quantize, simulate
from compressor.quantize.grid import dequantize
from compressor.quantize.grid import quantize as integers_of
from compressor.quantize.simulate import on_grid
from compressor.types import Capabilities, Model, QParams, Quantization
from compressor.vit import to_torch

ORT = targets.get("ort").CAPABILITIES
FORMS = {"ort": ORT, "qdq": targets.get("openvino").CAPABILITIES, "packed": replace(ORT, qkv="packed")}
CROSSED = 5e-5  # share of integers a float32 sum may carry across a rounding boundary; 3e-6 measured


@dataclass(frozen=True)
class Demo:
    model: Model
    plan: Quantization
    skewed: Quantization  # with zero points at the inputs of fc2
    golden: np.ndarray


@pytest.fixture(scope="module")
def demo() -> Demo:
    torch.set_num_threads(1)
    model = load("demo")
    images = list(batches(open_images("demo", limit=64), model.preprocess, 32))
    stats = observe(to_torch(model), images, ObservePlan())
    plans = (quantize(model, stats, QuantizeConfig("w8a8", asymmetric=sites)) for sites in ((), ("fc2",)))
    return Demo(model, *plans, images[0][:8])


def runtime_integers(demo: Demo, form: Capabilities) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """Site -> the integers ONNX Runtime stored there (several, where a site is read twice), and the logits."""
    proto = ir.to_proto(lower(demo.model, form, demo.plan))
    found: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            found.setdefault(node.input[1].removesuffix(".scale"), []).append(node.output[0])
    unsigned = form.qdq == "integer_ops"
    kind = onnx.TensorProto.UINT8 if unsigned else onnx.TensorProto.INT8
    names = [name for several in found.values() for name in several]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name in names)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip(["logits", *names], session.run(["logits", *names], {"pixels": demo.golden}), strict=True))
    shift = 128 if unsigned else 0
    sites = {site: [values[name].astype(np.int32) - shift for name in several] for site, several in found.items()}
    return sites, values["logits"]


@dataclass(frozen=True)
class Comparison:
    worst: int  # largest difference in quantization steps
    crossed: float  # share of integers that differ
    logits: float


def compare(demo: Demo, plan: Quantization, sites: Mapping[str, list[np.ndarray]], logits: np.ndarray) -> Comparison:
    """The simulation under `plan`, site by site, each continued with the runtime's integers."""
    differences: list[np.ndarray] = []

    def tap(site: str, x: torch.Tensor) -> torch.Tensor:
        if site not in plan.activations:
            return x
        ours = integers_of(x.numpy(), plan.activations[site])
        for theirs in sites[site]:  # in the last block, only the rows of the tokens the head reads
            differences.append(np.abs(ours[:, : theirs.shape[1]] - theirs))
        first = sites[site][0]
        ours[:, : first.shape[1]] = first
        return torch.from_numpy(dequantize(ours, plan.activations[site]))

    with torch.inference_mode():
        simulated = to_torch(on_grid(demo.model, plan.weights))(torch.from_numpy(demo.golden), tap).numpy()
    every = np.concatenate([d.ravel() for d in differences])
    return Comparison(int(every.max()), float((every > 0).mean()), float(np.abs(simulated - logits).max()))


@pytest.mark.parametrize("form", FORMS)
def test_simulation_and_runtime_agree_to_one_step(demo, form):
    sites, logits = runtime_integers(demo, FORMS[form])
    assert set(sites) == set(demo.plan.activations) and len(sites) == 2 + 4 * 9
    result = compare(demo, demo.plan, sites, logits)
    assert result.worst <= 1
    assert result.crossed < CROSSED
    assert result.logits < 1e-4  # float32 sums, on equal integers


@pytest.mark.parametrize("form", ["ort", "qdq"])
def test_zero_points_change_nothing_about_it(demo, form):
    assert all(q.zero_point != 0 for site, q in demo.skewed.activations.items() if site.endswith("fc2"))
    skewed = replace(demo, plan=demo.skewed)
    sites, logits = runtime_integers(skewed, FORMS[form])
    result = compare(skewed, skewed.plan, sites, logits)
    assert result.worst <= 1 and result.crossed < CROSSED and result.logits < 1e-4
    assert compare(skewed, demo.plan, sites, logits).worst > 10  # control: without the zero points


@pytest.mark.parametrize(("what", "site"), [("weights", "blocks.4.fc1.weight"), ("activations", "blocks.4.fc1")])
def test_a_scale_off_by_one_percent_is_seen(demo, what, site):
    """The control: one of 76 grids, a percent wrong in the simulation."""
    sites, logits = runtime_integers(demo, ORT)
    changed = dict(getattr(demo.plan, what))
    params = changed[site]
    changed[site] = QParams(np.asarray(params.scale * np.float32(1.01)), params.zero_point, params.bits, params.axis)
    result = compare(demo, replace(demo.plan, **{what: changed}), sites, logits)
    assert result.crossed > 5 * CROSSED


def test_free_running_they_classify_alike(demo):
    """Without being given each other's integers: the error of the simulation stays below that of quantization."""
    pixels = torch.from_numpy(demo.golden)
    _, logits = runtime_integers(demo, ORT)
    with torch.inference_mode():
        simulated, real = simulate(demo.model, demo.plan)(pixels).numpy(), to_torch(demo.model)(pixels).numpy()
    assert np.abs(simulated - logits).max() < np.abs(real - logits).max() < 0.3
    assert (simulated.argmax(1) == logits.argmax(1)).all()
