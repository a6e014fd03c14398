"""What a compiler says about a model it has built for hardware that is not here: placement and a modelled latency.

Stored beside the artifact as ``NAME.estimate.json``; everything in it is the vendor's estimate, never a measurement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import BundleError
from compressor.types import Array, Artifact, OpRecord

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["Estimate", "Estimated", "mac_share", "macs_by_node", "read", "write"]


@dataclass(frozen=True)
class Estimate:
    """One compiler's claims about one built model.

    Args:
        estimator: whose model of the chip, which version, at which settings.
        leaves_out: what the numbers do not contain.
        latency_ms: modelled; None where the vendor's tools give none.
        subgraphs: modelled facts of each piece that runs on the accelerator without interruption.
        ops: every operation with its placement, ``NPU`` or ``CPU``.
        npu_mac_share: share of the multiply-accumulates that run on the accelerator.
    """

    estimator: str
    leaves_out: str
    latency_ms: float | None
    subgraphs: tuple[Mapping[str, Any], ...]
    ops: tuple[OpRecord, ...]
    npu_mac_share: float

    @property
    def cpu_ops(self) -> tuple[OpRecord, ...]:
        """Operations that fell back to the CPU."""
        return tuple(op for op in self.ops if op.placement == "CPU")

    def to_json(self) -> dict[str, Any]:
        """The keys that ``vitrim profile --json`` adds for a compiled target."""
        cpu = [{"name": op.name, "type": op.type} for op in self.cpu_ops]
        return {"estimated": True, **asdict(self), "cpu_ops": cpu}


class Estimated:
    """What sessions of built models share: placement and a modelled latency are known without running anything."""

    artifact: Artifact

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        """Every operation with its placement, as the compiler reported it; times are unknown."""
        del inputs  # Unused: placement was decided when the model was built
        return self.estimate().ops

    def estimate(self) -> Estimate:
        """What the compiler said when it built the model."""
        return read(self.artifact)


def write(estimate: Estimate, path: Path) -> Path:
    """Store `estimate` as JSON; returns `path`."""
    path.write_text(json.dumps(estimate.to_json(), indent=1), encoding="utf-8")
    return path


def read(artifact: Artifact) -> Estimate:
    """The estimate stored with `artifact`.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    try:
        path = next(f for f in artifact.files if f.name.endswith(".estimate.json"))
        stored = json.loads(path.read_text(encoding="utf-8"))
        ops = tuple(OpRecord(**op) for op in stored["ops"])
        names = ("estimator", "leaves_out", "latency_ms", "npu_mac_share")
        return Estimate(ops=ops, subgraphs=tuple(stored["subgraphs"]), **{n: stored[n] for n in names})
    except (StopIteration, OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{artifact.path}: must have the estimate its compiler left, got none that is readable.",
            hint="Build it again.",
        ) from error


def macs_by_node(graph: onnx_ir.Model) -> dict[str, int]:
    """Multiply-accumulates of every Conv, MatMul and Gemm of a graph with a fixed batch, by node name."""
    import onnx
    import onnx_ir

    proto = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(graph), strict_mode=True, data_prop=True)
    values = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {t.name: list(t.dims) for t in proto.graph.initializer}
    macs = {}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            macs[node.name] = prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
        elif node.op_type in ("MatMul", "Gemm"):
            macs[node.name] = prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return macs


def mac_share(macs: Mapping[str, int], ops: tuple[OpRecord, ...]) -> float:
    """Share of `macs` in nodes that `ops` places on the NPU; a node the compiler does not list counts as not there."""
    placed = {op.name for op in ops if op.placement == "NPU"}
    return sum(n for name, n in macs.items() if name in placed) / max(1, sum(macs.values()))
