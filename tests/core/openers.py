"""What worker processes of the tests open: sessions that need no runtime."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import numpy as np

from compressor.errors import BundleError
from compressor.types import Array, OpRecord, Session

INPUTS = {"x": np.zeros((1, 2), np.float32)}


class Sleeper:
    """Takes at least `ms` per inference; says things on stdout, as runtimes do."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        print("a runtime talks to itself")
        time.sleep(self.ms / 1e3)
        return dict(inputs)

    def ops(self, inputs: Mapping[str, Array]) -> tuple[OpRecord, ...]:
        del inputs  # Unused
        return (OpRecord("blocks.0.fc1", "MatMul", "CPU", "int8", self.ms),)


def sleeper(ms: float) -> tuple[Callable[[], Session], dict[str, Array]]:
    return (lambda: Sleeper(ms)), INPUTS


def damaged() -> tuple[Callable[[], Session], dict[str, Array]]:
    raise BundleError("b: 'x' is listed in the manifest but missing.", hint="Copy the bundle again.")


def crash() -> tuple[Callable[[], Session], dict[str, Array]]:
    os.write(2, b"Illegal instruction in kernel_17\n")
    os._exit(132)


def crash_later(after: int) -> tuple[Callable[[], Session], dict[str, Array]]:
    class Fragile(Sleeper):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.left = after

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.left -= 1
            if self.left < 0:
                os._exit(9)
            return dict(inputs)

    return Fragile, INPUTS
