"""Runs inside the Rockchip environment: rknn-toolkit2 calibrates and compiles, its simulator runs what was compiled.

Functions take and return ``(JSON arguments, arrays)``; see `targets._venv`. Files are written where the worker runs. The toolkit
cannot simulate a ``.rknn`` file, so it compiles in its two "hybrid" steps: the first leaves a float model and the ranges it
calibrated, the second turns them into what is exported, and again into what is simulated; the integers are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["compile", "load", "run"]

_sessions: list[Any] = []  # the one model this process simulates
STEM = "model"
PARTS = tuple(f"{STEM}.{part}" for part in ("model", "data", "quantization.cfg"))  # as the first step names its files


def compile(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantize ``arguments["onnx"]`` (``STEM.onnx``) on the calibration images and compile it for ``arguments["chip"]``."""
    import numpy as np

    names = [f"image{i}.npy" for i in range(len(arrays["calibration"]))]
    for name, image in zip(names, arrays["calibration"], strict=True):
        np.save(name, image[None])
    Path("images.txt").write_text("\n".join(names), encoding="utf-8")
    tool = _toolkit()
    tool.config(
        target_platform=arguments["chip"], quantized_dtype="w8a8"
    )  # no mean or deviation: images come normalised
    _done("load_onnx", tool.load_onnx(model=arguments["onnx"]))
    _done("hybrid_quantization_step1", tool.hybrid_quantization_step1(dataset="images.txt", proposal=False))
    tool.release()
    tool = _second_step(PARTS)
    _done("export_rknn", tool.export_rknn(f"{STEM}.rknn"))
    return {"files": [str(Path(name).resolve()) for name in (f"{STEM}.rknn", *PARTS)]}, {}


def load(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open what ``arguments["parts"]``, the files of the first step, compile to, in the simulator for `run`."""
    del arrays  # Unused
    tool = _second_step(arguments["parts"])
    _done("init_runtime", tool.init_runtime())
    _sessions[:] = [tool]
    return {}, {}


def run(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only output for the only input, one image after the other."""
    import numpy as np

    (images,) = arrays.values()
    runs = [_sessions[0].inference(inputs=[image[None]], data_format=["nchw"])[0] for image in images]
    return {}, {arguments["output"]: np.concatenate(runs)}


def _toolkit() -> Any:
    """The toolkit, verbose: its table of operations is only ever printed."""
    library = ctypes.CDLL(None)  # whole lines, so that what Python prints does not cut those of the library
    library.setvbuf(ctypes.c_void_p.in_dll(library, "stdout"), None, 1, 0)
    from rknn.api import RKNN  # type: ignore[import-not-found]

    return RKNN(verbose=True)


def _second_step(parts: Sequence[str]) -> Any:
    tool = _toolkit()
    keys = ("model_input", "data_input", "model_quantization_cfg")
    _done("hybrid_quantization_step2", tool.hybrid_quantization_step2(**dict(zip(keys, parts, strict=True))))
    return tool


def _done(what: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{what} returned {code}")
