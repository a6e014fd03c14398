"""Runs inside the Qualcomm environment: ONNX Runtime quantizes, the HTP compiler makes a context, its emulator runs it.

Functions take and return ``(JSON arguments, arrays)``; see `targets._venv`. Files are written where the worker runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["compile", "load", "run", "session"]

_sessions: list[Any] = []  # the one model this process emulates


def compile(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantize ``arguments["onnx"]`` on the calibration images and compile it for a chip."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model

    plain, prepared, qdq = arguments["onnx"], "vitrim_prepared.onnx", "vitrim_qdq.onnx"
    changed = qnn_preprocess_model(plain, prepared)
    source = prepared if changed else plain
    activations = QuantType.QUInt16 if arguments["activation_bits"] == 16 else QuantType.QUInt8
    reader = _reader(arguments["input"], arrays["calibration"])
    config = get_qnn_qdq_config(source, reader, activation_type=activations, weight_type=QuantType.QUInt8)
    quantize(source, qdq, config)
    options = {**arguments["provider"], "offload_graph_io_quantization": "0"}
    context = Path(f"{arguments['name']}.onnx")  # its binary is written beside it and referred to by name
    entries = {"ep.context_enable": "1", "ep.context_file_path": str(context), "ep.context_embed_mode": "0"}
    session(qdq, options, entries)
    nodes = [[n.name, n.op_type] for n in onnx.load(context, load_external_data=False).graph.node]
    inside = [[n.name, n.op_type] for n in onnx.load(qdq).graph.node]
    files = [str(p.resolve()) for p in (context, *sorted(Path().glob(f"{context.stem}*.bin")))]
    precision = f"w8a{arguments['activation_bits']}"
    return {"nodes": nodes, "quantized": inside, "files": files, "precision": precision}, {}


def load(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open the quantized model, or a context, in the emulator for `run`."""
    del arrays  # Unused
    _sessions[:] = [session(arguments["model"], {}, {})]
    return {"outputs": [o.name for o in _sessions[0].get_outputs()]}, {}


def run(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs by name for inputs by name, one image after the other."""
    import numpy as np

    del arguments  # Unused
    opened = _sessions[0]
    names = [o.name for o in opened.get_outputs()]
    count = len(next(iter(arrays.values())))
    runs = [opened.run(names, {n: a[i : i + 1] for n, a in arrays.items()}) for i in range(count)]
    return {}, {n: np.concatenate([r[k] for r in runs]) for k, n in enumerate(names)}


def _reader(name: str, images: Any) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        """One image at a time, as often as the quantizer asks from the start."""

        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> Any:
            return next(self._images, None)

        def rewind(self) -> None:
            self._images = iter([{name: image[None]} for image in images])

    return Reader()


def session(model: str, provider: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """An ONNX Runtime session of `model` on the HTP, or its emulator; `provider` and `entries` are the QNN provider's options."""
    import onnxruntime
    import onnxruntime_qnn  # type: ignore[import-not-found]

    name = "QNNExecutionProvider"
    try:
        onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        if "already registered" not in str(error):
            raise
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == name]
    options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **provider})
    return onnxruntime.InferenceSession(model, options)
