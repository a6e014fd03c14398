"""The widths that an NPU compiler pads to: what it models for two 1 x 1 convolutions, 192 -> width -> 192 over 197 tokens.

    python bench/npu_widths.py --target bpu [--widths 512 514 516 520 ...]

Printed are the widths at which the modelled cost changes; between them the chip computes zeros. Needs the compiler.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir

import targets
from compressor.lower.graph import GraphBuilder
from compressor.types import Array, BuildOptions
from targets import _estimate, bpu

WIDTHS = (512, 514, 516, 520, 524, 528, 532, 536, 540, 544, 552, 560, 576)
CHANNELS, TOKENS = 192, 197


def pair(width: int, opset: int) -> onnx_ir.Model:
    """Two convolutions around a Relu, random weights."""
    rng, graph = np.random.default_rng(0), GraphBuilder(opset, 1)

    def conv(name: str, x: onnx_ir.Value, size: tuple[int, int]) -> onnx_ir.Value:
        weight = (0.05 * rng.standard_normal((*size, 1, 1))).astype(np.float32)
        return graph.op(name, "Conv", x, graph.constant(f"{name}.weight", weight), kernel_shape=(1, 1))

    x = conv("up", graph.input("pixels", (CHANNELS, 1, TOKENS)), (width, CHANNELS))
    return graph.finish("pair", conv("logits", graph.op("relu", "Relu", x), (CHANNELS, width)), (CHANNELS, 1, TOKENS))


def cost(name: str, width: int, images: Array) -> float:
    """Modelled microseconds of the BPU at O2, or cycles of RKNN."""
    target = targets.get(name)
    graph = pair(width, target.CAPABILITIES.opset)
    with tempfile.TemporaryDirectory() as folder:
        options = BuildOptions(Path(folder), target.CAPABILITIES.precisions[0], calibration=(images,))
        artifact = bpu.compile_graph(graph, options, "O2") if name == "bpu" else target.build(graph, options)
        found = _estimate.read(artifact)
    cycles = sum(piece.get("cycles", 0) for piece in found.subgraphs)
    return cycles if found.latency_ms is None else 1e3 * found.latency_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("bpu", "rknn"), required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    args = parser.parse_args()
    images = np.random.default_rng(1).standard_normal((2, CHANNELS, 1, TOKENS)).astype(np.float32)
    unit = "us" if args.target == "bpu" else "cycles"
    for width in args.widths:
        print(f"{args.target} {width:>5} {cost(args.target, width, images):>10.1f} {unit}", flush=True)


if __name__ == "__main__":
    main()
