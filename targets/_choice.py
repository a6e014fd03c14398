"""A network that a vendor's compiler can quantize in several ways: which is built, by what each computes on calibration images.

Additions of the residual stream may be one such way: every block adds to that stream, whose largest channels are far above the
others, so it is what int8 rounds worst, and chips that add in 16 bits take more time for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import ParityError
from compressor.intervals import proportion_interval
from compressor.types import Array

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["FLOOR", "IMAGES", "best", "divergence", "float_logits", "residual_additions"]

IMAGES = 64  # that every way is judged on
FLOOR = 0.9  # share of classes that the way kept must have in common with float
JUDGED = 8  # images below which no share is judged, as many as a bundle's golden inputs
RESIDUAL = re.compile(r"tokens\.add|blocks\.\d+\.(attn|mlp)")  # as `lower` names them


def residual_additions(graph: onnx_ir.Model) -> tuple[str, ...]:
    """The tensors that the residual stream's additions write, in order; none in a graph that `lower` did not make."""
    adds = (node for node in graph.graph if node.op_type == "Add")
    names = (node.outputs[0].name or "" for node in adds)
    return tuple(name for name in names if RESIDUAL.fullmatch(name))


def float_logits(graph: onnx_ir.Model, images: Array) -> Array:
    """What the float `graph` answers to `images` (n, *its input), one at a time: (n, classes)."""
    import onnx_ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = onnx_ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    return np.stack([session.run(None, {pixels.name: image[None]})[0].ravel() for image in images])


def divergence(reference: Array, logits: Array) -> float:
    """Mean Kullback-Leibler divergence of the predictions (n, classes) from those of `reference`, in nats.

    >>> round(divergence(np.array([[0.0, 0.0]]), np.log([[0.9, 0.1]])), 3)  # 0.5 log(0.5 / 0.9) + 0.5 log(0.5 / 0.1)
    0.511
    """
    wanted, got = (z.astype(np.float64) - z.max(axis=1, keepdims=True) for z in (reference, logits))
    wanted, got = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)) for z in (wanted, got))
    return float((np.exp(wanted) * (wanted - got)).sum(axis=1).mean())


def best(reference: Array, ways: Mapping[str, Array], worth: Mapping[str, float]) -> tuple[str, str]:
    """The way whose logits (n, classes) diverge least from `reference`, and a sentence with what was measured.

    Args:
        reference: float logits (n, classes).
        ways: logits of every way by name.
        worth: of a way that takes more time, the share of the others' least divergence that its own must stay below.

    Raises:
        ParityError: even that one has fewer than `FLOOR` of the classes, by more than so few images can be wrong about.
    """
    found = {name: divergence(reference, logits) for name, logits in ways.items()}
    chosen = min(found, key=lambda name: found[name] / worth.get(name, 1.0))
    same = {name: int((logits.argmax(1) == reference.argmax(1)).sum()) for name, logits in ways.items()}
    count = len(reference)
    told = "; ".join(f"{n}: divergence {found[n]:.3g}, {same[n]} of {count} classes agree" for n in found)
    if count >= JUDGED and proportion_interval(same[chosen], count)[1] < FLOOR:
        raise ParityError(
            f"Quantized model: at least {FLOOR:.0%} of the classes must be float's, got {same[chosen]} of {count} ({told}).",
            hint="Prune less, calibrate on more images (--calib-size), or choose a target with 16 bits or float.",
        )
    return chosen, told
