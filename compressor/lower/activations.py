"""MLP activations in the form a target has: one node, the exact erf form, or the tanh form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import onnx_ir as ir

from compressor.lower.graph import GraphBuilder
from compressor.types import MlpKind

__all__ = ["activation", "sigmoid_unit"]


def activation(
    g: GraphBuilder, name: str, kind: MlpKind, form: Literal["node", "erf", "tanh"], x: ir.Value
) -> ir.Value:
    """The hidden units' activation: SiLU for ``swiglu``'s gate, else the GELU that `kind` names.

    `form` ``tanh`` writes the exact GELU as its tanh approximation too (below 5e-4 apart): for chips without Erf.
    """
    if kind in ("quick_gelu", "swiglu"):
        return sigmoid_unit(g, name, x, 1.702 if kind == "quick_gelu" else 1.0)
    tanh = kind == "gelu_tanh"
    if form == "node" and g.opset >= 20:
        return g.op(name, "Gelu", x, **({"approximate": "tanh"} if tanh else {}))
    emit: Callable[..., ir.Value] = _tanh_gelu if tanh or form == "tanh" else _erf_gelu
    return emit(g, name, x)


def sigmoid_unit(g: GraphBuilder, name: str, x: ir.Value, slope: float) -> ir.Value:
    """``x * sigmoid(slope * x)``: SiLU, and the quick GELU."""
    scaled = x if slope == 1.0 else g.op(f"{name}.slope", "Mul", x, g.floats("sigmoid.slope", slope))
    return g.op(name, "Mul", x, g.op(f"{name}.sigmoid", "Sigmoid", scaled))


def _erf_gelu(g: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """``0.5 x (1 + erf(x / sqrt 2))`` in the order of operations that compilers recognize."""
    erf = g.op(f"{name}.erf", "Erf", g.op(f"{name}.div", "Div", x, g.floats("gelu.sqrt2", math.sqrt(2.0))))
    one = g.op(f"{name}.one", "Add", erf, g.floats("gelu.one", 1.0))
    return g.op(name, "Mul", g.op(f"{name}.mul", "Mul", x, one), g.floats("gelu.half", 0.5))


def _tanh_gelu(g: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""
    cube = g.op(f"{name}.cube", "Mul", g.op(f"{name}.square", "Mul", x, x), x)
    inner = g.op(f"{name}.inner", "Add", x, g.op(f"{name}.cubic", "Mul", cube, g.floats("gelu.cubic", 0.044715)))
    slope = g.floats("gelu.slope", math.sqrt(2.0 / math.pi))
    tanh = g.op(f"{name}.tanh", "Tanh", g.op(f"{name}.arg", "Mul", inner, slope))
    one = g.op(f"{name}.one", "Add", tanh, g.floats("gelu.one", 1.0))
    return g.op(name, "Mul", g.op(f"{name}.mul", "Mul", x, one), g.floats("gelu.half", 0.5))
