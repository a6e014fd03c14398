"""Rockchip NPU (RK3588 and its relatives): quantized and compiled by rknn-toolkit2, proven on its simulator, counted in cycles.

The graph is the token layout at opset 18: the compiler fuses its LayerNormalization, softmax attention and erf GELU, and turns
every product with weights into a convolution by itself. Measured with rknn-toolkit2 2.5.0 on DeiT-Tiny, rk3588: nothing is
left on the CPU but the conversion of the input and of the output. A 16 x 16 patch convolution is computed with stride 4 and
three quarters of each axis thrown away: 4.35 M cycles, against 0.115 M behind two exact halvings of the image; a pixel
unshuffle costs 0.23 M and leaves a reshape on the CPU, as logits of rank 2 would. A convolution's cycles are those of whole
32 channels: on three of them it wastes nine tenths, so eight pixels that lie side by side are read as 24 channels, 0.049 M. The
reshape and the transposition that this takes are on the NPU too, where the table counts nothing for them.

The toolkit calibrates. What it makes of the network with the residual stream's additions in int8 and in int16 is simulated on
calibration images, the better one is exported (`_choice`), and one that is another network is refused.

On the board itself, `open` runs the ``.rknn`` through Rockchip's rknn-toolkit-lite2 (``rknnlite.api.RKNNLite``: load_rknn,
init_runtime, inference; a 4-D input is NHWC unless told otherwise, and some releases know nothing else:
rockchip-linux/rknn-toolkit2 issues 206 and 344). This has met no board yet; that its form of an image gives what NCHW gives
was checked in the toolkit's simulator, whose interface is the same.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import TargetUnavailable
from compressor.types import Array, Artifact, Availability, BuildOptions, Capabilities, OpRecord
from targets import _board, _choice, _estimate, _venv
from targets._artifacts import check_chip, check_files, check_precision, tensor_specs
from targets._compile import Build, compiling, flat
from targets._constraints import Table
from targets._rknn_constraints import TABLES

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["CAPABILITIES", "NAME", "available", "build", "constraints", "install", "open"]

NAME = "rknn"
CAPABILITIES = Capabilities(
    layout="tokens",
    opset=18,
    precisions=("w8a8",),
    gelu="erf",  # fused with the convolution before it
    patch="columns",  # the whole embedding of DeiT-Tiny: 48,768 cycles, against 115,200 with "halving"
    patch_stride=4,  # a larger one is split
    logits="map",
    qdq="none",
    batch="static",
)
CHIPS = ("rk3588", "rk3576", "rk3562", "rk3568", "rk3566")
LIMITS = _venv.Limits(seconds=1800)
SCRIPT = Path(__file__).with_name("_rknn_worker.py")
RECIPE = _venv.Recipe(
    name=NAME,
    python="3.11",
    steps=(
        ("--no-deps", "rknn-toolkit2==2.5.0"),
        (
            *(
                "numpy==1.26.4",
                "onnx==1.18.0",
                "onnxruntime==1.23.2",
                "protobuf==4.25.4",
                "opencv-python-headless<4.12",
            ),
            *("scipy", "fast-histogram", "ruamel.yaml", "psutil", "tqdm"),
        ),
        ("torch==2.13.0",),
        ("setuptools<81",),  # last: the toolkit imports pkg_resources
    ),
    module="rknn.api",
    package="rknn-toolkit2",
)
SUFFIXES = (".rknn", ".simulator.model", ".simulator.data", ".simulator.cfg")  # of what the worker leaves, in its order
KNOWN = {
    "No module named 'pkg_resources'": "Its setuptools is too new: run vitrim doctor --install rknn.",
    "_p_fuse_": "A fusion rule of the toolkit failed on this graph; the log names it.",
    "No space left": "Free some disk space.",
}
HEADER = re.compile(r"\] ID +OpType +DataType +Target .*$", re.M)
ROW = re.compile(r"\] (\d+) +(\w+) +(\w+) +(CPU|NPU) .*? \d+/\d+/(\d+) +(?:\d+% +)?(\d+) *(\S*) *$", re.M)
ENDS = ("InputOperator", "OutputOperator")  # conversions around the network, no operations of it
BOARD = "rknnlite"


def _last(images: Array) -> Array:
    """(n, in, h, w) -> (n, h, w, in)."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


LAYOUTS: Mapping[str, Callable[[Array], Array]] = {"NCHW": lambda images: images, "NHWC": _last}  # that graphs take


def _worker(log: Path | None = None) -> _venv.Worker:
    return _venv.Worker(RECIPE, SCRIPT, log, LIMITS, KNOWN)


def available() -> Availability:
    """Whether this is a board, or the toolkit's environment is installed; starts nothing."""
    return _board.availability(RECIPE, BOARD)


def on_board() -> bool:
    """Whether `open` runs on the chip here, not in the simulator."""
    return bool(_board.present(BOARD))


def install(say: Callable[[str], None]) -> Path:
    """Create the toolkit's environment (Python 3.11, about 1.5 GB); `say` gets one sentence per step.

    Raises:
        TargetUnavailable: there is no Python 3.11, or pip failed.
    """
    return _venv.install(RECIPE, say)


def constraints(chip: str = "") -> Table:
    """What keeps an operation off the NPU of `chip`, with sources; needs no vendor tool.

    Raises:
        ConfigError: the chip is unknown.
    """
    return TABLES[check_chip(NAME, CHIPS, chip)]


def build(graph: onnx_ir.Model, options: BuildOptions) -> Artifact:
    """A ``.rknn`` for the board, what the simulator compiles it from, the placement and the log with the table of cycles.

    ``options.chip`` is rk3588 (the default), rk3576, rk3562, or rk3568 and rk3566, whose softmax stays on the CPU.

    Raises:
        ConfigError: the precision or chip is unknown, or there are no calibration images.
        ParityError: the toolkit's integers do not compute the network (`_choice.FLOOR`).
        TargetUnavailable: the toolkit is not installed, failed, or took too long.
    """
    check_precision(NAME, CAPABILITIES, options)
    chip = check_chip(NAME, CHIPS, options.chip)
    (pixels,) = tensor_specs(graph.graph.inputs)
    layout = "NHWC" if any(pixels.shape[1:] == _last(x).shape[1:] for x in options.calibration) else "NCHW"
    options = replace(options, calibration=tuple(map(LAYOUTS[layout], options.calibration)))
    with compiling(NAME, _worker, graph, options) as job:
        parts, measured = _quantized(job, pixels.name, chip)
        reply = job.worker.call("compile", {"parts": parts})[0]
        kept = [options.out_dir / f"{options.name}{suffix}" for suffix in SUFFIXES]
        files = tuple(Path(shutil.copyfile(*pair)) for pair in zip(reply["files"], kept, strict=True))
    estimate = _parse(job.log.read_text(encoding="utf-8", errors="replace"), graph, chip)
    artifact = flat(job.artifact(files, estimate, {"chip": chip, "pixels": layout, **measured}))
    if layout == "NCHW":
        return artifact
    batch, rows, cols, channels = pixels.shape
    return replace(artifact, inputs=(replace(pixels, shape=(batch, channels, rows, cols)),))  # as they are handed in


def _quantized(job: Build, pixels: str, chip: str) -> tuple[list[str], dict[str, str]]:
    """The toolkit's files with the residual additions in int8 or, where it is worth their time, in int16; and what decided.

    Raises:
        ParityError: the better of the two is not the same network either.
    """
    images = np.concatenate(job.options.calibration)
    wanted = {"onnx": str(job.onnx), "chip": chip, "additions": _choice.residual_additions(job.graph)}
    ways = job.worker.call("quantize", wanted, {"calibration": images})[0]
    judged = images[: _choice.IMAGES]

    def simulated(parts: list[str]) -> Array:
        job.worker.call("load", {"parts": parts})
        logits = job.worker.call("run", {"output": "logits"}, {pixels: judged})[1]["logits"]
        return logits.reshape(len(judged), -1)

    reference = _choice.float_logits(job.graph, judged)
    chosen, told = _choice.best(reference, {way: simulated(parts) for way, parts in ways.items()}, ("int16",))
    return ways[chosen], {"int16": "additions" if chosen == "int16" else "nothing", "measured": told}


def open(artifact: Artifact, threads: int = 1) -> RknnSession | _board.OnBoard:
    """`artifact` on the chip, on a board; elsewhere the toolkit's simulation: the chip's integers, at no meaningful speed.

    Raises:
        TargetUnavailable: the toolkit is not installed, or the board does not take the model.
        BundleError: a file is missing or changed.
    """
    del threads  # Unused: the chip and the simulator decide
    check_files(artifact)
    return _board.OnBoard(artifact, BOARD, _lite(artifact)) if on_board() else RknnSession(artifact)


def _layout(artifact: Artifact) -> str:
    return artifact.settings.get("pixels", "NCHW")


def _lite(artifact: Artifact) -> _board.Infer:
    """One inference through Rockchip's library: float32 in, which it quantizes itself, float32 out.

    It counts a graph's (1, h, w, in) as channels, rows and columns and wants the first of these last, as of any input.
    """
    layout = LAYOUTS[_layout(artifact)]
    try:
        from rknnlite.api import RKNNLite  # type: ignore[import-not-found]

        lite = RKNNLite()
        steps = (("load_rknn", lambda: lite.load_rknn(str(artifact.path))), ("init_runtime", lite.init_runtime))
        for name, step in steps:
            code = step()
            if code:
                raise RuntimeError(f"{name} returned {code}")
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        hint = f"It was built for {artifact.settings.get('chip', CHIPS[0])}; librknnrt must be as new as the toolkit."
        raise TargetUnavailable(f"{BOARD}: must load {artifact.path.name}, got {got}.", hint=hint) from error

    def infer(image: Array) -> object:
        outputs = lite.inference(inputs=[_last(layout(image))])
        if not outputs:
            raise RuntimeError("inference returned nothing")
        return outputs[0]

    return infer


class RknnSession(_estimate.Estimated):
    """A process that simulates one quantized model."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        parts = [next(str(f.resolve()) for f in artifact.files if f.name.endswith(suffix)) for suffix in SUFFIXES[1:]]
        self._worker = _worker()
        self._worker.call("load", {"parts": parts})

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; the model's batch is one, so images are simulated one after the other."""
        (spec,) = self.artifact.outputs
        layout = LAYOUTS[_layout(self.artifact)]
        images = {name: layout(pixels) for name, pixels in inputs.items()}
        _, outputs = self._worker.call("run", {"output": spec.name}, images)
        return {spec.name: outputs[spec.name].reshape(-1, *spec.shape[1:])}


@dataclass(frozen=True)
class Row:
    """One line of the compiler's table; several may come from one node, and one from several."""

    op: OpRecord
    cycles: int
    kilobytes: int  # read and written


def _parse(log: str, graph: onnx_ir.Model, chip: str) -> _estimate.Estimate:
    """The last table of operations in `log`."""
    rows = _rows(log)
    pieces = tuple(_piece(i, piece) for i, piece in enumerate(_runs(rows)))
    uncounted = sorted({row.op.type for row in rows if row.op.placement == "NPU" and not row.cycles})
    version = next(iter(re.findall(r"rknn-toolkit2 version: ([\w.]+)", log)), "of unknown version")
    return _estimate.Estimate(
        estimator=f"rknn-toolkit2 {version} cycle table, {chip}",
        leaves_out=f"a latency; cycles of {', '.join(uncounted)}; CPU operations; converting the input and the output",
        latency_ms=None,
        subgraphs=pieces,
        ops=tuple(row.op for row in rows),
        npu_mac_share=_mac_share(rows, graph),
    )


def _rows(log: str) -> list[Row]:
    table = HEADER.split(log)[-1] if HEADER.search(log) else ""
    found = [match.groups() for match in ROW.finditer(table)]
    if not found or [int(row[0]) for row in found] != list(range(len(found))):
        raise TargetUnavailable("The toolkit must report where its operations run, got no whole table in its log.")
    rows = []
    for number, kind, dtype, place, total, kilobytes, full in found:
        name = full.partition(":")[2] or f"{kind}{number}"
        rows.append(Row(OpRecord(name, kind, place, dtype.lower(), 0.0), int(total), int(kilobytes)))
    return [row for row in rows if row.op.type not in ENDS]


def _runs(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows that follow each other on the NPU."""
    for place, run in groupby(rows, lambda row: row.op.placement):
        if place == "NPU":
            yield list(run)


def _piece(number: int, rows: list[Row]) -> dict[str, Any]:
    return {
        "name": f"npu_{number}",
        "cycles": sum(row.cycles for row in rows),
        "ddr_bytes": 1024 * sum(row.kilobytes for row in rows),
        "cycles_by_op": {row.op.name: row.cycles for row in rows if row.cycles},
    }


def _mac_share(rows: list[Row], graph: onnx_ir.Model) -> float:
    """Share of the multiply-accumulates that no row puts on the CPU; the table is whole, but fused products lose their names."""
    macs = _estimate.macs_by_node(graph)
    away = {name for row in rows if row.op.placement == "CPU" for name in _nodes(row, graph)}
    return 1 - sum(macs.get(name, 0) for name in away) / max(1, sum(macs.values()))


def _nodes(row: Row, graph: onnx_ir.Model) -> Iterator[str]:
    """The graph's nodes behind `row`, whose name extends that of one; fused attention stands for both its products."""
    named = [node for node in graph.graph if node.name and row.op.name.startswith(node.name)]
    node = max(named, key=lambda node: len(node.name or ""), default=None)
    if node is not None:
        yield node.name or ""
    if node is not None and row.op.type == "exSDPAttention":
        first = node.inputs[0].producer()  # type: ignore[union-attr]
        while first is not None and first.op_type != "MatMul":
            first = first.inputs[0].producer()  # type: ignore[union-attr]
        if first is not None:
            yield first.name or ""
