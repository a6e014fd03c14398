"""Runs inside the Rockchip environment: rknn-toolkit2 calibrates and compiles, its simulator runs what was compiled.

Functions take and return ``(JSON arguments, arrays)``; see `targets._venv`. Files are written where the worker runs. The toolkit
cannot simulate a ``.rknn`` file, so it compiles in its two "hybrid" steps: the first leaves a float model and the ranges it
calibrated, the second turns them into what is exported, and again into what is simulated; the integers are the same.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["compile", "load", "quantize", "run"]

_sessions: list[Any] = []  # the one model this process simulates
STEM = "model"
PARTS = tuple(f"{STEM}.{part}" for part in ("model", "data", "quantization.cfg"))  # as the first step names its files


def quantize(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Calibrate ``arguments["onnx"]`` (``STEM.onnx``) for ``arguments["chip"]``: the first step's files, by what they compute.

    ``int8``, and ``int16`` where the toolkit lets the tensors ``arguments["additions"]`` be so.
    """
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
    parts = {"int8": PARTS}
    wide = _widened(Path(PARTS[-1]).read_text(encoding="utf-8"), arguments["additions"])
    if wide:
        Path("int16.cfg").write_text(wide, encoding="utf-8")
        parts["int16"] = (*PARTS[:-1], "int16.cfg")
    return {way: [str(Path(name).resolve()) for name in names] for way, names in parts.items()}, {}


def _widened(settings: str, additions: Sequence[str]) -> str:
    """The first step's `settings` with int16 for the layers that the toolkit made of `additions`; empty if there are none.

    It names a layer as the tensor it came from, and what it did to that behind a sign: ``blocks.0.attn-rs``.
    """
    empty = "custom_quantize_layers: {}"
    layers = re.findall(r"^    ([^\s:]+):$", settings.partition("quantize_parameters:")[2], re.M)
    found = [layer for layer in layers if re.split(r"[-_#]", layer)[0] in additions]
    wanted = "".join(f"\n    {layer}: int16" for layer in found)
    return settings.replace(empty, empty.removesuffix(" {}") + wanted, 1) if found and empty in settings else ""


def compile(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile ``arguments["parts"]``, files of `quantize`, to a ``.rknn``; its table is the last that is printed."""
    del arrays  # Unused: calibrated before
    _done("export_rknn", _second_step(arguments["parts"]).export_rknn(f"{STEM}.rknn"))
    return {"files": [str(Path(f"{STEM}.rknn").resolve()), *arguments["parts"]]}, {}


def load(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open what ``arguments["parts"]``, files of `quantize`, compile to, in the simulator for `run`."""
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
