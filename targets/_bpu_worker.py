"""Runs inside the BPU environment: D-Robotics' mapper compiles, its ONNX runtime simulates the quantized model on x86.

Functions take and return ``(JSON arguments, arrays)``; see `targets._venv`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["compile", "load", "quantize", "run"]

_sessions: list[Any] = []  # the one model this process simulates


def compile(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantize and compile ``arguments["onnx"]`` on the calibration images; the files are in ``./out``, where the worker runs."""
    folder = Path("cal")
    folder.mkdir()
    for i, image in enumerate(arrays["calibration"]):
        image.astype("float32").tofile(folder / f"{i:05d}.bin")
    Path("config.yaml").write_text(json.dumps(arguments["config"]), encoding="utf-8")  # JSON is YAML
    mapper = Path(sys.executable).with_name("hb_mapper")
    command = [sys.executable, str(mapper), "makertbin", "--model-type", "onnx", "--config", "config.yaml"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    text = done.stdout.decode(errors="replace")
    print(text, flush=True)
    files = sorted(str(p.resolve()) for p in Path("out").glob("*")) if Path("out").is_dir() else []
    if done.returncode or not any(name.endswith(".bin") for name in files):
        lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
        errors = [line for line in lines if "rror" in line] or lines[-1:] or ["no output"]
        raise RuntimeError(errors[0].rpartition("error message: ")[2])
    return {"log": text, "files": files}, {}


def quantize(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapper's quantization of ``arguments["onnx"]`` alone, as a file for `load`, and its threshold of every activation.

    A graph with QuantizeLinear nodes keeps its own thresholds and takes no images.
    """
    import onnx
    from horizon_nn.api import build_onnx  # type: ignore[import-not-found]

    calibration: dict[str, Any] = {"calibration_type": "load"}
    if arrays:
        images = [image[None] for image in arrays["calibration"]]
        calibration = {"calibration_type": "max", "calibration_data": {arguments["input"]: images}}
    stem = Path(arguments["onnx"]).stem
    build_onnx(arguments["onnx"], arguments["chip"], stem, cali_dict=calibration, skip_step=["skip_compiler"])
    nodes = [n for n in onnx.load(f"{stem}_calibrated_model.onnx").graph.node if n.op_type == "HzCalibration"]
    ends = {n.input[0]: next(max(a.floats) for a in n.attribute if a.name == "thresholds") for n in nodes}
    return {"model": str(Path(f"{stem}_quantized_model.onnx").resolve()), "thresholds": ends}, {}


def load(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open the quantized model for `run`."""
    from horizon_tc_ui import HB_ONNXRuntime  # type: ignore[import-not-found]

    _sessions[:] = [HB_ONNXRuntime(model_file=arguments["model"])]
    return {"inputs": list(_sessions[0].input_names), "outputs": list(_sessions[0].output_names)}, {}


def run(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs by name for inputs by name, one image after the other."""
    session = _sessions[0]
    count = len(next(iter(arrays.values())))
    runs = [session.run(session.output_names, {n: a[i : i + 1] for n, a in arrays.items()}) for i in range(count)]
    import numpy as np

    return {}, {n: np.concatenate([r[k] for r in runs]) for k, n in enumerate(session.output_names)}
