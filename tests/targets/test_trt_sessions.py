"""Sessions of one engine share nothing, whichever threads run them: a stand-in driver and runtime, since a GPU is not here."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compressor.types import Artifact, TensorSpec
from targets import _tensorrt, _tensorrt_worker, trt
from targets._artifacts import digest

SHAPE = (1, 4)


class Driver:
    """Device memory as arrays by address; like the real one, it refuses threads that have no current context."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.thread = threading.local()
        self.addresses = iter(range(1, 1000))

    def __call__(self, function: str, *arguments: Any) -> None:
        free = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
        if function not in free and not getattr(self.thread, "current", False):
            raise RuntimeError(f"{function} failed with CUDA error 201")
        getattr(self, function, lambda *_: None)(*arguments)

    def cuCtxSetCurrent(self, context: Any) -> None:
        self.thread.current = True

    def cuMemAlloc_v2(self, address: Any, size: ctypes.c_size_t) -> None:
        address._obj.value = next(self.addresses)
        self.memory[address._obj.value] = np.zeros(size.value // 4, np.float32)

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> None:
        del self.memory[address.value]

    def cuMemcpyHtoD_v2(self, to: ctypes.c_uint64, source: ctypes.c_void_p, size: ctypes.c_size_t) -> None:
        ctypes.memmove(self.memory[to.value].ctypes.data, source, size.value)

    def cuMemcpyDtoH_v2(self, to: ctypes.c_void_p, source: ctypes.c_uint64, size: ctypes.c_size_t) -> None:
        ctypes.memmove(to, self.memory[source.value].ctypes.data, size.value)


class Context:
    """What an execution context does here: wait as `Gpu.meet` says, then multiply by the number in the engine file."""

    def __init__(self, gpu: Gpu, factor: float) -> None:
        self.gpu, self.factor = gpu, factor
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert shape == SHAPE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return SHAPE

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.gpu.meet()
        memory = self.gpu.driver.memory
        memory[self.addresses["logits"]][:] = self.factor * memory[self.addresses["pixels"]]
        return True


class Gpu:
    """The stand-in for the driver and for TensorRT."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.meet: Callable[[], object] = lambda: None
        self.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=self.engine)

    def engine(self, plan: bytes) -> Any:
        return SimpleNamespace(
            num_io_tensors=2,
            get_tensor_name=("pixels", "logits").__getitem__,
            get_tensor_mode=lambda name: SimpleNamespace(name="INPUT" if name == "pixels" else "OUTPUT"),
            create_execution_context=lambda: Context(self, float(plan)),
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    monkeypatch.setattr(_tensorrt_worker, "cuda", found.driver)
    monkeypatch.setattr(_tensorrt_worker, "library", lambda package: found)
    log = SimpleNamespace(lines=[], errors=lambda: "")
    monkeypatch.setattr(_tensorrt_worker, "logger", lambda package: log)
    _tensorrt_worker.context.cache_clear()
    yield found
    _tensorrt_worker.context.cache_clear()


def opened(folder: Path, factor: float = 2.0) -> _tensorrt.EngineSession:
    path = folder / "model.engine"
    path.write_bytes(str(factor).encode())
    specs = (TensorSpec("pixels", "float32", (-1, 4)),), (TensorSpec("logits", "float32", (-1, 4)),)
    return trt.open(Artifact("tensorrt", path, digest((path,)), 1, "fp32", *specs, {"stage": "engine"}, (path,)))


def answer(session: _tensorrt.EngineSession, value: float) -> float:
    (found,) = set(session.run({"pixels": np.full(SHAPE, value, np.float32)})["logits"].ravel().tolist())
    return float(found)


def test_sessions_that_run_at_once_have_buffers_of_their_own(gpu: Gpu, tmp_path: Path) -> None:
    sessions = [opened(tmp_path), opened(tmp_path)]
    gpu.meet = threading.Barrier(2, timeout=10).wait  # both have written their inputs before either computes
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, sessions, (3.0, 5.0))) == [6.0, 10.0]
    with ThreadPoolExecutor(2) as pool:  # the control: one engine for both would answer one of them with the other's
        sessions[1]._arguments = sessions[0]._arguments
        sessions[0]._arguments["engine"]._turn = sessions[1]._arguments["engine"]._turn = threading.Semaphore(2)
        assert list(pool.map(answer, sessions, (3.0, 5.0))) != [6.0, 10.0]


def test_threads_that_share_a_session_take_turns(gpu: Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    gpu.meet = lambda: time.sleep(0.005)  # long enough for the other thread to come
    values = [float(n) for n in range(1, 21)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda v: answer(session, v), values)) == [2 * v for v in values]


def test_a_rebuilt_file_is_another_engine(gpu: Gpu, tmp_path: Path) -> None:
    old, new = opened(tmp_path, 2.0), opened(tmp_path, 3.0)
    assert (answer(old, 5.0), answer(new, 5.0)) == (10.0, 15.0)


def test_a_session_that_is_dropped_frees_its_memory(gpu: Gpu, tmp_path: Path) -> None:
    session = opened(tmp_path)
    assert answer(session, 1.0) == 2.0 and len(gpu.driver.memory) == 2
    with ThreadPoolExecutor(1) as pool:  # by a thread that has no context yet
        kept = [session]
        del session
        pool.submit(kept.clear).result()
    assert not gpu.driver.memory
