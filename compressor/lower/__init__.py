"""`Model` -> ONNX graph, emitted from the spec in milliseconds; nothing is traced, nothing is edited afterwards."""

from __future__ import annotations

import onnx_ir as ir

from compressor.errors import ConfigError
from compressor.lower.conv import lower_conv
from compressor.lower.tokens import lower_tokens
from compressor.types import Capabilities, Model, Quantization

__all__ = ["lower"]

LAYOUTS = {"conv": lower_conv, "tokens": lower_tokens}


def lower(model: Model, capabilities: Capabilities, quantization: Quantization | None = None) -> ir.Model:
    """The ONNX graph of `model` in the form `capabilities` asks for; same arguments, same bytes.

    Args:
        model: canonical model.
        capabilities: layout, opset, operator forms, QDQ style and batch axis of the target.
        quantization: integer grids; None, or a linear without a grid, is emitted in float.

    Returns:
        Input ``pixels`` (batch, in, h, w) float32, and (batch, h, w, in) with ``patch="columns"`` where the rows that are
        read are a multiple of 16; output ``logits`` (batch, classes) float32, and (batch, classes, 1, 1) with ``logits="map"``.
        Without a classifier, the pooled features take the place of the classes.

    Raises:
        ConfigError: the layout is unknown, or the plan and the capabilities contradict each other.
    """
    if capabilities.layout not in LAYOUTS:
        raise ConfigError(f"Capabilities.layout must be one of {', '.join(LAYOUTS)}, got {capabilities.layout!r}.")
    return LAYOUTS[capabilities.layout](model, capabilities, quantization)
