"""D-Robotics RDK (Horizon BPU): compiled by the vendor's mapper, simulated on x86, latency from the compiler's timing model.

The chip multiplies int8 in 4-D convolutions, so the graph is the convolutional layout. The mapper quantizes it four ways: with
the thresholds it calibrates on the images it is given, cut to what float attains; with ours (`_ranges`); with ours and int16 for
what scales a token in a LayerNorm; and with the residual stream's additions in int16 too (bernoulli2 has no int16). All are
handed over as nodes where the mapper has its own. What diverges least from float in its simulator is compiled, int16 where it
is worth its time (`_choice`), the artifact's settings say which, and one that is another network is refused.

Measured with mapper 1.24.3 on DeiT-Tiny at O2: the whole network is one subgraph, with no operation on the CPU. A softmax node
would stay there, twelve of them between thirteen subgraphs; the vendor's option that moves it, a ReduceMax, and a MaxPool over a
whole row each make the compiler run without end at 197 tokens, and poolings in small windows do not (bench/results/npu.md).
Logits of rank 2 would be a reshape on the CPU.

On the board itself, `open` runs the ``.bin`` through D-Robotics' `hobot_dnn` (RDK documentation, "Model inference API":
``pyeasy_dnn.load(path)``, ``Model.forward(array)``, ``pyDNNTensor.buffer``). This has met no board yet.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import ConfigError, TargetUnavailable
from compressor.types import Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord, TensorSpec
from targets import _board, _choice, _estimate, _ranges, _venv
from targets._artifacts import check_chip, check_files, check_precision, tensor_specs
from targets._bpu_constraints import TABLES
from targets._compile import Build, compiling, flat
from targets._constraints import Table

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "available", "build", "compile_graph", "constraints", "install", "open"]

NAME = "bpu"
CAPABILITIES = Capabilities(
    layout="conv",
    opset=11,
    precisions=("w8a8",),
    norm="conv",
    patch="halving",  # one block of DeiT-Tiny at O2: 0.47 ms, against 1.95 with the 16 x 16 convolution
    patch_stride=4,  # two blocks at O2: 1.111 ms, against 1.139 with 2 and 1.267 with 8
    gelu="erf",  # the mapper turns the whole pattern into one table look-up
    softmax="exp",
    logits="map",
    qdq="none",
    batch="static",
)
CHIPS = ("bayes-e", "bayes", "bernoulli2")  # RDK X5, RDK Ultra, RDK X3
HAVE_INT16 = ("bayes-e", "bayes")  # hbdk-cc fails on it for bernoulli2
EFFORTS = ("O0", "O1", "O2", "O3")
LIMITS = _venv.Limits(seconds=3600)
SCRIPT = Path(__file__).with_name("_bpu_worker.py")
RECIPE = _venv.Recipe(
    name=NAME,
    python="3.10",
    steps=(
        ("--no-deps", "dgdk==1.0.0", "dg_nn_toolkit==1.0.0", "rdkx5_yolo_mapper==1.0.0"),
        (
            *("numpy==1.23.0", "onnx==1.15.0", "onnxruntime==1.16.2", "protobuf==3.20.3", "opencv-python==4.6.0.66"),
            *("scipy==1.13.1", "scikit-image==0.19.0", "click", "pyyaml", "schema", "easydict", "pathos", "absl-py"),
            *("graphviz", "jinja2", "tqdm", "paramiko", "psutil", "Pillow", "pydot", "six", "tabulate"),
            *("msgpack-numpy", "multiprocess", "matplotlib", "pycocotools"),
        ),
    ),
    module="horizon_tc_ui",
    package="rdkx5_yolo_mapper",
    files={"torch.py": Path(__file__).with_name("_bpu_torch.py").read_text(encoding="utf-8")},
)
KNOWN = {
    "can not find hbdk library": "The compiler is not complete: run vitrim doctor --install bpu.",
    "maximum supported version is 11": "The mapper reads opset 10 and 11.",
    "shape_inference or model_check failed": "The mapper reads opset 10 and 11 with every shape written out, no other.",
    "4294967295": "A Reshape with -1 is read as 2^32 - 1: shapes must be written out.",
    "No space left": "Free some disk space.",
}
ANSI = re.compile(r"\x1b\[[0-9;]*m")
NODE = re.compile(r"^(\S+)\s+(BPU|CPU)\s+(id\(\d+\)|--)\s+(\S+)\s+(?:[\d.]+|--)\s+\S+\s+(\S+)\s*$", re.M)
LATENCY = re.compile(r"latency = ([\d.]+) us, DDR = (\d+) bytes\s+\(see \S*?([^/\s]+)\.html\)")
NORM = re.compile(r"(.*\.)?\w*norm\d?\.(square|power\.conv|inverse)")  # what scales a token, as `lower` names it
OURS = "vitrim"  # ways to quantize, beside the vendor's; those in part with int16 take up to 11 % more time
INT16 = {"vitrim-norms": "norms", "vitrim-norms-additions": "norms and additions"}
BOARD = ("hobot_dnn", "hobot_dnn_rdkx5")  # as the board's system image has it, and as the package index


def _worker(log: Path | None = None) -> _venv.Worker:
    return _venv.Worker(RECIPE, SCRIPT, log, LIMITS, KNOWN)


def available() -> Availability:
    """Whether this is a board, or the mapper's environment is installed; starts nothing."""
    return _board.availability(RECIPE, *BOARD)


def on_board() -> bool:
    """Whether `open` runs on the chip here, not in the simulator."""
    return bool(_board.present(*BOARD))


def install(say: Callable[[str], None]) -> Path:
    """Create the mapper's environment (Python 3.10, about 1.1 GB); `say` gets one sentence per step.

    Raises:
        TargetUnavailable: there is no Python 3.10, or pip failed.
    """
    return _venv.install(RECIPE, say)


def constraints(chip: str = "") -> Table:
    """What keeps an operation off the BPU of `chip`, with sources; needs no vendor tool.

    Raises:
        ConfigError: the chip is unknown.
    """
    return TABLES[check_chip(NAME, CHIPS, chip)]


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """A ``.bin`` for the board, the quantized ONNX it was made from for the simulator, the estimate and the compiler's log.

    ``options.chip`` is the mapper's ``march``: bayes-e (RDK X5, the default), bayes (Ultra) or bernoulli2 (X3).

    Raises:
        ConfigError: the precision or chip is unknown, or there are no calibration images.
        ParityError: the mapper's integers do not compute the network (`_choice.FLOOR`).
        TargetUnavailable: the mapper is not installed, failed, or took too long.
    """
    return compile_graph(graph, options, "O2")


def compile_graph(graph: onnx_ir.Model, options: BuildOptions, effort: str) -> Artifact:
    """`build` at another effort of the compiler: O0 takes seconds, and its latency means nothing; O2 is what ships."""
    check_precision(NAME, CAPABILITIES, options)
    chip = check_chip(NAME, CHIPS, options.chip)
    if effort not in EFFORTS:
        raise ConfigError(f"The effort of target 'bpu' must be one of {', '.join(EFFORTS)}, got {effort!r}.")
    (pixels,) = tensor_specs(graph.graph.inputs)
    with compiling(NAME, _worker, graph, options) as job:
        kept, measured = _quantized(job, graph, pixels, chip)
        reply = job.compile({"config": _config(kept, pixels, chip, effort, own=kept != job.onnx)})
        files = _collect(reply["files"], options)
    estimate = _parse(reply["log"], graph, chip, effort)
    return flat(job.artifact(files, estimate, {"chip": chip, "effort": effort, **measured}))


def _quantized(job: Build, graph: onnx_ir.Model, pixels: TensorSpec, chip: str) -> tuple[Path, dict[str, str]]:
    """The graph with the best grids where the mapper puts its own, or in float where it refuses them all; and what decided.

    The mapper quantizes every way (`_ways`), and its integers are held against float on calibration images.

    Raises:
        ParityError: the best of them is not the same network either.
    """
    images = np.concatenate(job.options.calibration)
    judged = images[: _choice.IMAGES]

    def quantized(onnx: Path, arrays: dict[str, Array]) -> dict[str, Any]:
        """The mapper's quantized model, and its threshold of every tensor."""
        return job.worker.call("quantize", {"onnx": str(onnx), "input": pixels.name, "chip": chip}, arrays)[0]

    def simulated(model: str) -> Array:
        job.worker.call("load", {"model": model})
        (logits,) = job.worker.call("run", {}, {pixels.name: judged})[1].values()
        return logits.reshape(len(logits), -1)

    plain, seen = quantized(job.onnx, {"calibration": images}), _ranges.observe(graph, judged)
    ways = _ways(graph, plain["thresholds"], seen, int16=chip in HAVE_INT16)
    files = {way: job.save(gridded, way) for way, gridded in ways.items()}
    logits, refused = dict[str, Array](), ""
    for way, file in files.items():
        try:
            logits[way] = simulated(quantized(file, {})["model"])
        except TargetUnavailable as error:
            refused += f"; the mapper refuses {way}: {error}"
    if not logits.keys() - {*INT16}:
        files["vendor"], logits["vendor"] = job.onnx, simulated(plain["model"])
    way, measured = _choice.best(seen.logits, logits, tuple(INT16))
    return files[way], {
        "ranges": OURS if way in INT16 else way,
        "int16": INT16.get(way, "nothing"),
        "measured": measured + refused,
    }


def _ways(
    graph: onnx_ir.Model, theirs: Mapping[str, float], seen: _ranges.Seen, *, int16: bool
) -> dict[str, onnx_ir.Model]:
    """The float `graph` with grids where the mapper puts some: as it ends them, cut to what float attains; as we do; and ours
    with int16 for what scales a token, and for the residual stream's additions and the convolutions that write them too.

    Args:
        graph: what `lower` made.
        theirs: the mapper's threshold by tensor.
        seen: what float computed.
        int16: whether the chip has it.
    """
    weights = {v.name or "" for node in graph.graph if node.op_type == "Conv" for v in node.inputs[1:] if v}
    norms = {name for name in seen.histograms if NORM.fullmatch(name)}
    stream = _stream(graph, _choice.residual_additions(graph))

    def gridded(ends: Mapping[str, float], wide: set[str]) -> onnx_ir.Model:
        found = {**ends, **{name: seen.histograms[name].largest for name in wide}}
        return _ranges.with_grids(graph, {name: found[name] for name in {*theirs, *wide} - weights}, wide)

    ours = {**theirs, **_ranges.thresholds(graph, seen)}
    ways = {"vendor": gridded(_ranges.attained(theirs, seen), set()), OURS: gridded(ours, set())}
    if int16 and norms and stream:
        ways |= dict(zip(INT16, (gridded(ours, norms), gridded(ours, norms | stream)), strict=True))
    return ways


def _stream(graph: onnx_ir.Model, sums: Collection[str]) -> set[str]:
    """The additions `sums`, and the convolutions and slices that write what they add, by the tensors they write."""
    adds = [node for node in graph.graph if node.outputs[0].name in sums]
    makers = (value.producer() for node in adds for value in node.inputs if value)
    written = (node.outputs[0].name or "" for node in makers if node and node.op_type in ("Conv", "Slice"))
    return {*sums, *written}


def open(artifact: Artifact, threads: int = 1) -> BpuSession | _board.OnBoard:
    """`artifact` on the chip, on a board; elsewhere the vendor's simulation: the chip's integers, at no meaningful speed.

    Raises:
        TargetUnavailable: the mapper is not installed, or the board does not take the model.
        BundleError: a file is missing or changed.
    """
    del threads  # Unused: the chip and the simulator decide
    check_files(artifact)
    package = _board.present(*BOARD)
    return _board.OnBoard(artifact, package, _hobot(artifact, package)) if package else BpuSession(artifact)


def _hobot(artifact: Artifact, package: str) -> _board.Infer:
    """One inference through D-Robotics' library: a float32 feature map in, NCHW as `_config` says, a float32 tensor out."""
    try:
        if package == "hobot_dnn":
            from hobot_dnn import pyeasy_dnn  # type: ignore[import-not-found]
        else:
            from hobot_dnn_rdkx5 import pyeasy_dnn  # type: ignore[import-not-found]
        (model, *_) = pyeasy_dnn.load(str(artifact.path))
        shape = tuple(int(size) for size in model.inputs[0].properties.shape)
    except (ImportError, RuntimeError, OSError, ValueError, IndexError) as error:
        got = f"{type(error).__name__}: {error}"
        raise TargetUnavailable(f"{package}: must load {artifact.path.name}, got {got}.") from error
    if shape != artifact.inputs[0].shape:
        raise TargetUnavailable(
            f"{artifact.path.name}: must take {artifact.inputs[0].shape}, got {shape} on this board."
        )

    def infer(image: Array) -> object:
        return model.forward(image)[0].buffer

    return infer


class BpuSession(_estimate.Estimated):
    """A process that simulates one quantized model."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._worker = _worker()
        self._worker.call("load", {"model": str(_one(artifact, ".quantized.onnx"))})

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; the chip's batch is one, so images are simulated one after the other."""
        _, outputs = self._worker.call("run", {}, inputs)
        return {spec.name: outputs[spec.name].reshape(-1, *spec.shape[1:]) for spec in self.artifact.outputs}


def _config(onnx: Path, pixels: TensorSpec, chip: str, effort: str, *, own: bool) -> dict[str, Any]:
    """The mapper's options; `own`: the graph brings its thresholds."""
    images = {"cal_data_dir": "./cal", "cal_data_type": "float32", "calibration_type": "max"}
    return {
        "model_parameters": {
            "onnx_model": str(onnx),
            "march": chip,
            "working_dir": "out",
            "output_model_file_prefix": "model",
        },
        "input_parameters": {
            "input_name": pixels.name,
            "input_shape": "x".join(map(str, pixels.shape)),
            "norm_type": "no_preprocess",  # images come normalised
            **{f"input_type_{when}": "featuremap" for when in ("rt", "train")},
            **{f"input_layout_{when}": "NCHW" for when in ("rt", "train")},
        },
        "calibration_parameters": {"calibration_type": "load"} if own else images,
        "compiler_parameters": {"compile_mode": "latency", "optimize_level": effort, "core_num": 1},
    }


def _collect(names: list[str], options: BuildOptions) -> tuple[Path, ...]:
    """The compiler's files that are kept, in the artifact's folder; the board's file first."""
    kept = []
    for ending, suffix in (("model.bin", ".bin"), ("model_quantized_model.onnx", ".quantized.onnx")):
        source = next((name for name in names if name.endswith(f"/{ending}")), None)
        if source is None:
            raise TargetUnavailable(f"The mapper must write {ending}, got {[Path(n).name for n in names]}.")
        kept.append(Path(shutil.copyfile(source, options.out_dir / f"{options.name}{suffix}")))
    return tuple(kept)


def _parse(log: str, graph: onnx_ir.Model, chip: str, effort: str) -> _estimate.Estimate:
    """The mapper's table of nodes and the compiler's line per subgraph."""
    text = ANSI.sub("", log)
    places = {"BPU": "NPU", "CPU": "CPU"}
    ops = tuple(OpRecord(n, kind, places[on], dtype, 0.0) for n, on, _, kind, dtype in NODE.findall(text))
    if not ops:
        raise TargetUnavailable("The mapper must report where its operations run, got no table in its log.")
    pieces = tuple({"name": n, "latency_us": float(us), "ddr_bytes": int(b)} for us, b, n in LATENCY.findall(text))
    version = next(iter(re.findall(r"hbdk version (\S+)", text)), "of unknown version")
    return _estimate.Estimate(
        estimator=f"HBDK {version} timing model, {chip} at {effort}",
        leaves_out="CPU operations, transfers between CPU and BPU, reading the image",
        latency_ms=sum(p["latency_us"] for p in pieces) / 1000,
        subgraphs=pieces,
        ops=ops,
        npu_mac_share=_estimate.mac_share(_estimate.macs_by_node(graph), ops),
    )


def _one(artifact: Artifact, ending: str) -> Path:
    return next(file for file in artifact.files if file.name.endswith(ending))
