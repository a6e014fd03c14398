"""A network that a vendor's compiler can quantize in several ways: which is built, by what each computes on calibration images.

Sixteen bits where int8 rounds worst may be such a way: what scales the tokens in a LayerNorm, and the additions of the residual
stream, some of whose channels may be far above the others. Chips take more time for them, mostly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import ParityError
from compressor.intervals import paired_ratio, proportion_interval
from compressor.types import Array

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["FLOOR", "IMAGES", "best", "divergences", "float_logits", "residual_additions"]

IMAGES = 64  # that every way is judged on
FLOOR = 0.9  # share of classes that the way kept must have in common with float
WORTH = 0.8  # of a divergence, the share that is left at most by what takes more time
LEAST = 1e-12  # nats, below which a divergence is rounding
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


def divergences(reference: Array, logits: Array) -> Array:
    """Kullback-Leibler divergence of each prediction (n, classes) from that of `reference`, in nats: (n,) float64.

    >>> divergences(np.array([[0.0, 0.0]]), np.log([[0.9, 0.1]])).round(3)  # 0.5 log(0.5 / 0.9) + 0.5 log(0.5 / 0.1)
    array([0.511])
    """
    wanted, got = (z.astype(np.float64) - z.max(axis=1, keepdims=True) for z in (reference, logits))
    wanted, got = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)) for z in (wanted, got))
    found: Array = (np.exp(wanted) * (wanted - got)).sum(axis=1)
    return np.maximum(found, LEAST)


def best(reference: Array, ways: Mapping[str, Array], dear: Sequence[str] = ()) -> tuple[str, str]:
    """The way whose logits (n, classes) diverge least from `reference`, and a sentence with what was measured.

    Args:
        reference: float logits (n, classes).
        ways: logits of every way by name.
        dear: those that may take more time, the cheapest first. The mean of a divergence hangs on few images, so one is taken
            where the median image surely loses a fifth of the divergence that what was best before leaves (`WORTH`, sign test).

    Raises:
        ParityError: even that one has fewer than `FLOOR` of the classes, by more than so few images can be wrong about.
    """
    each = {name: divergences(reference, logits) for name, logits in ways.items()}
    chosen = min((name for name in each if name not in dear), key=lambda name: each[name].mean())
    same = {name: int((logits.argmax(1) == reference.argmax(1)).sum()) for name, logits in ways.items()}
    count = len(reference)
    told = "; ".join(f"{n}: divergence {each[n].mean():.3g}, {same[n]} of {count} classes agree" for n in each)
    for way in (name for name in dear if name in each):
        paired = paired_ratio(each[way].tolist(), each[chosen].tolist())
        told += f"; {way} / {chosen}: median {paired.ratio:.2f} ({paired.low:.2f}-{paired.high:.2f})"
        chosen = way if paired.high < WORTH else chosen
    if count >= JUDGED and proportion_interval(same[chosen], count)[1] < FLOOR:
        raise ParityError(
            f"Quantized model: at least {FLOOR:.0%} of the classes must be float's, got {same[chosen]} of {count} ({told}).",
            hint="Prune less, calibrate on more images (--calib-size), or choose a target with 16 bits or float.",
        )
    return chosen, told
