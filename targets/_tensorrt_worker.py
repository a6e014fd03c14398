"""Talks to TensorRT 10 and 11 and to TensorRT-RTX, whose Python packages differ in a handful of calls: the only file that does.

Plain functions ``name(arguments, arrays) -> (result, arrays)``: run by an environment of its own (TensorRT-RTX, see
`_venv_worker.py`) or called directly where the library is installed (TensorRT). Imports NumPy and the vendor's package only.
Device memory goes through the CUDA driver, which is there wherever a GPU is: no CUDA toolkit, no torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["build", "load", "profile", "run"]

RTX = "tensorrt_rtx_bindings"
RUNS = 5  # profiled executions, the first being warm-up


@functools.cache
def library(package: str) -> Any:
    """`package`, "tensorrt" or "tensorrt_rtx_bindings"; the shared libraries of the latter are loaded first."""
    if package == RTX:
        importlib.import_module("tensorrt_rtx_libs")
    return importlib.import_module(package)


@functools.cache
def logger(package: str) -> Any:
    """Keeps what the library says; the layer table of a build is among it, and needs no GPU to read."""
    trt = library(package)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))

        def errors(self) -> str:
            return "; ".join(text.strip() for level, text in self.lines if level in ("ERROR", "INTERNAL_ERROR"))

    return Log()


def build(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An engine file ``arguments["engine"]`` from the ONNX file ``arguments["onnx"]``, always strongly typed.

    Args:
        arguments: ``package``; ``input`` its name, ``shapes`` [least, typical, largest] of it; for RTX ``chip``, "SM89" or
            so, empty for every chip from Ampere on; for TensorRT ``timing_cache``, a file reused between builds, and
            ``portable``, one of "", "hardware", "version".
        arrays: none.

    Returns:
        ``network``: [name, type, output type] of every layer as parsed; ``layers``: one line per layer of the engine;
        ``version``, ``seconds``, ``warnings``.
    """
    del arrays  # Unused
    trt, log = library(arguments["package"]), logger(arguments["package"])
    log.lines.clear()
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(arguments["onnx"]):
        raise ValueError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = configure(builder, arguments)
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(log.errors() or "no engine and no reason")
    seconds = time.perf_counter() - started
    keep_timings(config, arguments)
    Path(arguments["engine"]).write_bytes(bytes(plan))
    result = {
        "network": [describe(network.get_layer(i)) for i in range(network.num_layers)],
        "layers": layer_lines(arguments["package"], bytes(plan)),
        "version": trt.__version__,
        "seconds": seconds,
        "warnings": [text.strip() for level, text in log.lines if level == "WARNING"],
    }
    return result, {}


def configure(builder: Any, arguments: dict[str, Any]) -> Any:
    """The builder's options; raises ValueError for a chip the library does not know."""
    trt, config = library(arguments["package"]), builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    shapes = builder.create_optimization_profile()
    shapes.set_shape(arguments["input"], *map(tuple, arguments["shapes"]))
    config.add_optimization_profile(shapes)
    if arguments["package"] == RTX:
        if arguments["chip"]:
            known = trt.ComputeCapability.__members__
            if arguments["chip"] not in known:
                raise ValueError(f"chip must be one of {', '.join(c for c in known if c != 'NONE')}")
            config.num_compute_capabilities = 1
            config.set_compute_capability(known[arguments["chip"]], 0)
        return config
    if arguments["portable"] == "hardware":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if arguments["portable"] == "version":
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if arguments["timing_cache"]:
        reuse_timings(config, Path(arguments["timing_cache"]))
    return config


def reuse_timings(config: Any, path: Path) -> None:
    """Start from the timings in file `path`; from none where they are another release's or another GPU's."""
    if path.is_file():
        known = config.create_timing_cache(path.read_bytes())
        if known is not None and config.set_timing_cache(known, ignore_mismatch=False):
            return
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep_timings(config: Any, arguments: dict[str, Any]) -> None:
    """What the builder measured, stored for the next build."""
    if arguments["package"] != RTX and arguments["timing_cache"]:
        path = Path(arguments["timing_cache"])
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(bytes(config.get_timing_cache().serialize()))
        fresh.replace(path)


def describe(layer: Any) -> list[str]:
    """Name, type and output type of one layer of the parsed network."""
    return [layer.name, layer.type.name, layer.get_output(0).dtype.name if layer.num_outputs else ""]


def layer_lines(package: str, plan: bytes) -> list[str]:
    """The engine's layers, one "Name: ..., LayerType: ..., ..." line each.

    TensorRT-RTX lists them in its build log, so that no GPU is needed; TensorRT, which needs one to build, on being asked.
    """
    trt, log = library(package), logger(package)
    if package == RTX:
        text = "\n".join(message for _, message in log.lines)
    else:
        inspector = trt.Runtime(log).deserialize_cuda_engine(plan).create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)
    return [line for line in text.splitlines() if line.startswith("Name: ") and "LayerType: " in line]


# --------------------------------------------------------------------------- execution, where a GPU is


def cuda(function: str, *arguments: Any) -> None:
    """One call of the CUDA driver, checked."""
    code = getattr(ctypes.CDLL("libcuda.so.1"), function)(*arguments)
    if code:
        raise RuntimeError(f"{function} failed with CUDA error {code}")


@functools.cache
def context() -> ctypes.c_void_p:
    """The first GPU's primary context, which everything of this process shares."""
    device, found = ctypes.c_int(), ctypes.c_void_p()
    cuda("cuInit", 0)
    cuda("cuDeviceGet", ctypes.byref(device), 0)
    cuda("cuDevicePrimaryCtxRetain", ctypes.byref(found), device)
    return found


def enter() -> None:
    """Make `context` the calling thread's: the driver has a current one for each thread."""
    cuda("cuCtxSetCurrent", context())


class Buffer:
    """Device memory of a fixed size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._address = ctypes.c_uint64()
        cuda("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(size))

    @property
    def address(self) -> int:
        """Where it is."""
        return int(self._address.value)

    def write(self, array: Any) -> None:
        """Copy `array` to the device."""
        cuda("cuMemcpyHtoD_v2", self._address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))

    def read(self, array: Any) -> None:
        """Copy the device's bytes into `array`."""
        cuda("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), self._address, ctypes.c_size_t(array.nbytes))

    def __del__(self) -> None:
        if self._address.value:
            enter()  # whichever thread drops it
            cuda("cuMemFree_v2", self._address)


class Engine:
    """A deserialized engine with one execution context, one stream and its buffers; inputs and outputs are float32.

    Threads may share it: they take turns.
    """

    def __init__(self, package: str, path: str) -> None:
        self._stream, self._turn = ctypes.c_void_p(), threading.Lock()  # first: `__del__` asks for it
        trt, log = library(package), logger(package)
        enter()
        cuda("cuStreamCreate", ctypes.byref(self._stream), 1)
        self._log = log
        log.lines.clear()
        self._runtime = trt.Runtime(log)
        self.engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        self.context: Any = self.engine.create_execution_context() if self.engine else None
        if self.context is None:
            raise RuntimeError(log.errors() or "the engine does not load")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name).name for name in names}
        self.inputs = [name for name in names if modes[name] == "INPUT"]
        self.outputs = [name for name in names if modes[name] == "OUTPUT"]
        self._buffers: dict[str, Buffer] = {}

    def run(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name, from host memory to host memory."""
        with self._turn:
            enter()
            return self._run(arrays)

    def profile(self, arrays: dict[str, Any], watcher: Any) -> None:
        """Report the layers' times of a few executions to `watcher`, an ``IProfiler``."""
        with self._turn:
            enter()
            self.context.profiler = watcher
            for _ in range(RUNS):
                self._run(arrays)
            self.context.profiler = None

    def _run(self, arrays: dict[str, Any]) -> dict[str, Any]:
        for name in self.inputs:
            array = np.ascontiguousarray(arrays[name], dtype=np.float32)
            self.context.set_input_shape(name, array.shape)
            self._place(name, array.nbytes).write(array)
        results = {n: np.empty(tuple(self.context.get_tensor_shape(n)), dtype=np.float32) for n in self.outputs}
        for name, array in results.items():
            self._place(name, array.nbytes)
        if not self.context.execute_async_v3(self._stream.value):
            raise RuntimeError(self._log.errors() or "the engine does not run")
        cuda("cuStreamSynchronize", self._stream)
        for name, array in results.items():
            self._buffers[name].read(array)
        return results

    def __del__(self) -> None:
        if self._stream.value:
            enter()
            cuda("cuStreamDestroy_v2", self._stream)

    def _place(self, name: str, size: int) -> Buffer:
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = Buffer(size)
        self.context.set_tensor_address(name, self._buffers[name].address)
        return self._buffers[name]


def load(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``engine``: a new `Engine` of the file ``arguments["engine"]``, for `run` and `profile` in this process."""
    del arrays  # Unused
    return {"engine": Engine(arguments["package"], arguments["engine"])}, {}


def run(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs of the loaded ``arguments["engine"]`` for `arrays`."""
    return {}, arguments["engine"].run(arrays)


def profile(arguments: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``times``: median milliseconds by layer name over a few executions of the loaded ``arguments["engine"]``."""
    trt, loaded = library(arguments["package"]), arguments["engine"]
    taken: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            taken.setdefault(layer_name, []).append(ms)

    loaded.profile(arrays, Profiler())
    return {"times": {name: float(np.median(ms[1:] or ms)) for name, ms in taken.items()}}, {}
