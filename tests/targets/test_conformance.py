"""One suite for every target: what `targets.names()` lists here must build, run and refuse alike."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import targets
from compressor.errors import BundleError, ConfigError, TargetUnavailable
from compressor.lower import lower
from compressor.types import Artifact, BlockSpec, BuildOptions, Model, Precision, Session, VitSpec, Width
from tests.models import BASE, SPECS, minmax, random_model, random_pixels, torch_logits

FLOAT = ("fp32", "fp16", "bf16")
TOLERANCE = {
    "fp32": 1e-4,
    "fp16": 1e-2,
    "bf16": 0.1,
}  # float32 order of sums; 11 and 8 bits of mantissa through two blocks
QUANTIZED = 0.35  # int8 min-max grids of a random model with logits of order 2
TIMED = {"tensorrt-rtx": "the vendor's builder stamps its engines"}
MINUTES = dict.fromkeys(
    ("bpu", "qnn", "rknn"), "its compiler takes minutes in an environment of its own: see tests/npu"
)
UNTHREADED = {"null": "NumPy decides how many threads a matrix product takes"}


@pytest.fixture(params=targets.names())
def target(request: pytest.FixtureRequest) -> targets.Target:
    found = targets.get(request.param)
    if request.param in MINUTES:
        pytest.skip(f"{request.param}: {MINUTES[request.param]}")
    state = found.available()
    if not state.available:
        assert state.reason and state.fix
        pytest.skip(f"{request.param}: {state.reason}")
    return found


def make(target: targets.Target, folder: Path, precision: Precision = "fp32", model: Model | None = None) -> Artifact:
    model = model or random_model()
    width: Width = "e4m3" if precision == "fp8" else 8
    plan = None if precision in FLOAT else minmax(model, random_pixels(model.spec), width)
    graph = lower(model, target.CAPABILITIES, plan)
    return target.build(graph, BuildOptions(folder, precision, precision))


def opened(target: targets.Target, artifact: Artifact, threads: int = 1) -> Session:
    """A session, or a skip with its sentence where this machine can build but has no device to run on."""
    try:
        return target.open(artifact, threads=threads)
    except TargetUnavailable as error:
        pytest.skip(f"{target.NAME}: {error}")


def logits(session: Session, pixels: np.ndarray, artifact: Artifact) -> np.ndarray:
    if artifact.inputs[0].shape[0] == 1:  # a fixed batch of one
        return np.concatenate([session.run({"pixels": one[None]})["logits"] for one in pixels])
    return session.run({"pixels": pixels})["logits"]


def test_names_are_sorted_and_unique():
    assert list(targets.names()) == sorted(set(targets.names()))
    assert {"null", "openvino", "ort"} <= set(targets.names())


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"must be one of .*openvino, ort.*, got 'openvin'") as caught:
        targets.get("openvin")
    assert caught.value.hint == "Did you mean 'openvino'?"


def test_importing_every_target_loads_no_runtime():
    code = "import sys, targets; [targets.get(n) for n in targets.names()]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "targets.ort" in loaded
    assert not {"onnxruntime", "openvino", "nncf", "tensorrt", "torch", "onnx", "onnx_ir"} & set(loaded)


def test_what_a_target_says_about_itself(target):
    state, form = target.available(), target.CAPABILITIES
    assert state.version and form.opset >= 10 and form.precisions and form.width_multiple >= 1


def test_artifact_describes_its_files(target, tmp_path):
    for precision in target.CAPABILITIES.precisions:
        artifact = make(target, tmp_path, precision)
        assert (artifact.target, artifact.precision) == (target.NAME, precision)
        assert artifact.files[0] == artifact.path
        for file in artifact.files:
            assert file.is_file() and file.resolve().is_relative_to(tmp_path.resolve())
        contents = b"".join(file.read_bytes() for file in artifact.files)
        assert artifact.sha256 == hashlib.sha256(contents).hexdigest() and artifact.size_bytes == len(contents)
        (pixels,), (result,) = artifact.inputs, artifact.outputs
        assert (pixels.name, pixels.dtype, pixels.shape[1:]) == ("pixels", "float32", (3, 16, 16))
        assert (result.name, result.dtype, result.shape[1:]) == ("logits", "float32", (7,))
        assert str(tmp_path).encode() not in contents  # no path of the building machine inside
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) >= len(target.CAPABILITIES.precisions)


def test_same_graph_same_bytes(target, tmp_path):
    if target.NAME in TIMED:
        pytest.skip(f"{target.NAME}: {TIMED[target.NAME]}")
    for precision in target.CAPABILITIES.precisions:
        first, second = (make(target, tmp_path / part, precision) for part in "ab")
        assert first.sha256 == second.sha256
    assert make(target, tmp_path / "c", model=random_model(seed=8)).sha256 != make(target, tmp_path / "d").sha256


def test_every_precision_computes_the_model(target, tmp_path):
    model, pixels = random_model(), random_pixels(BASE)
    want = torch_logits(model, pixels)
    for precision in target.CAPABILITIES.precisions:
        artifact = make(target, tmp_path, precision)
        error = np.abs(logits(opened(target, artifact), pixels, artifact) - want).max()
        assert error < TOLERANCE.get(precision, QUANTIZED)
    other = torch_logits(random_model(seed=8), pixels)  # control: the loosest of these sees another model
    assert np.abs(other - want).max() > 2 * QUANTIZED


@pytest.mark.parametrize(
    "name", ["token_avg", "distilled", "swiglu", "qk_norm", "gelu_tanh", "quick_gelu", "odd image"]
)
def test_every_kind_of_model_runs(target, name, tmp_path):
    model = random_model(SPECS[name])
    pixels = random_pixels(model.spec)
    artifact = make(target, tmp_path, model=model)
    assert np.abs(logits(opened(target, artifact), pixels, artifact) - torch_logits(model, pixels)).max() < 1e-4


def test_batches_are_images_side_by_side(target, tmp_path):
    artifact = make(target, tmp_path)
    if artifact.inputs[0].shape[0] != -1:
        pytest.skip(f"{target.NAME}: the batch is fixed")
    session, pixels = opened(target, artifact), random_pixels(BASE, 5)
    one_by_one = np.concatenate([session.run({"pixels": one[None]})["logits"] for one in pixels])
    assert np.abs(session.run({"pixels": pixels})["logits"] - one_by_one).max() < 1e-4
    assert np.abs(session.run({"pixels": pixels[::-1].copy()})["logits"][::-1] - one_by_one).max() < 1e-4


def test_results_belong_to_the_caller(target, tmp_path):
    session = opened(target, make(target, tmp_path))
    pixels = random_pixels(BASE, 2)
    first = session.run({"pixels": pixels[:1]})["logits"]
    kept = first.copy()
    session.run({"pixels": pixels[1:]})
    assert (first == kept).all()


def test_ops_name_the_place_they_execute(target, tmp_path):
    session = opened(target, make(target, tmp_path))
    records = session.ops({"pixels": random_pixels(BASE, 1)})
    if not records:
        pytest.skip(f"{target.NAME}: the runtime offers no per-node table")
    assert all(record.name and record.type and record.placement and record.time_ms >= 0 for record in records)
    blocks = {record.name.split(".")[1] for record in records if record.name.startswith("blocks.")}
    assert blocks == {"0", "1"}


def cpu_ns() -> Mapping[str, int]:
    """Processor time of every thread of this process, in nanoseconds."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        times[task.name] = int((task / "schedstat").read_text().split()[0])
    return times


def busy_threads(session: Session, pixels: np.ndarray) -> int:
    """Threads that took at least a tenth of the processor time of a few runs."""
    session.run({"pixels": pixels})
    before = cpu_ns()
    for _ in range(5):
        session.run({"pixels": pixels})
    spent = [time - before.get(task, 0) for task, time in cpu_ns().items()]
    return sum(share > sum(spent) / 10 for share in spent)


@pytest.fixture(scope="module")
def wide() -> Iterator[Model]:
    """Large enough that a runtime splits its matrix products."""
    yield random_model(VitSpec((64, 64), (8, 8), 3, 256, (BlockSpec(4, 64, 64, 1024),) * 2, num_classes=7))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_threads_are_honoured(target, tmp_path, wide):
    if target.NAME in UNTHREADED:
        pytest.skip(f"{target.NAME}: {UNTHREADED[target.NAME]}")
    artifact = make(target, tmp_path, model=wide)
    pixels = random_pixels(wide.spec, 8 if artifact.inputs[0].shape[0] == -1 else 1)
    single = opened(target, artifact, 1)
    assert {busy_threads(single, pixels) for _ in range(3)} == {1}
    double = opened(target, artifact, 2)
    # A busy machine may run the second thread too late to find work left: seen once is enough, three never.
    seen = {busy_threads(double, pixels) for _ in range(10)}
    assert 2 in seen and max(seen) == 2


def test_damaged_artifacts_are_refused(target, tmp_path):
    artifact = make(target, tmp_path)
    opened(target, artifact)
    good = artifact.path.read_bytes()
    artifact.path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"must have sha256 {artifact.sha256}"):
        target.open(artifact)
    for broken in (b"", b"not a model", good[: len(good) // 2]):  # with a matching digest: as a forger would
        artifact.path.write_bytes(broken)
        contents = b"".join(file.read_bytes() for file in artifact.files)
        with pytest.raises(BundleError, match="must be") as caught:
            target.open(replace(artifact, sha256=hashlib.sha256(contents).hexdigest()))
        assert "\n" not in str(caught.value)
    artifact.path.unlink()
    with pytest.raises(BundleError, match="must be a file, got nothing there"):
        target.open(artifact)
    artifact.path.write_bytes(good)
    target.open(artifact)  # control: the original opens


def test_precisions_asked_for_by_name_are_built(target, tmp_path):
    for precision in target.CAPABILITIES.narrow:
        assert precision not in target.CAPABILITIES.precisions
        assert make(target, tmp_path, precision).precision == precision


def test_other_precisions_are_refused(target, tmp_path):
    known = (*target.CAPABILITIES.precisions, *target.CAPABILITIES.narrow)
    unknown = next(p for p in ("w6a6", "w4a8", "w8a16") if p not in known)
    with pytest.raises(ConfigError, match=f"must be one of {', '.join(known)}, got '{unknown}'"):
        target.build(lower(random_model(), target.CAPABILITIES), BuildOptions(tmp_path, unknown))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "module"), [("ort", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_is_a_sentence(name, module, tmp_path):
    """In a fresh interpreter where the package cannot be found."""
    artifact = make(targets.get("null"), tmp_path)
    code = f"""
import sys; sys.modules[{module!r}] = None
import targets
from pathlib import Path
from compressor.types import Artifact
from compressor.errors import TargetUnavailable
target = targets.get({name!r}); state = target.available()
print(state.available, state.reason, "|", state.fix)
try:
    target.open(Artifact({name!r}, Path({str(artifact.path)!r}), "", 0, "fp32", (), ()))
except TargetUnavailable as error:
    print(error, error.hint, error.exit_code)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, second = out.splitlines()
    assert first.startswith(f"False {module} is not installed | pip install")
    assert second.startswith(
        f"Target '{name}' must have {module} installed, got none. pip install"
    ) and second.endswith("3")
