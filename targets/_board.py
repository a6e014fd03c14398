"""Sessions on the accelerator itself, where the vendor's board package is installed; the simulators are for machines without one.

The board packages exist for ARM alone, and a package of that name on another machine could only be there by mistake: there the
simulator stays in charge. What a runner hands to the vendor, and what it takes back, is checked here once for all of them.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from compressor.errors import TargetUnavailable
from compressor.types import Array, Artifact, Availability
from targets import _estimate, _venv

__all__ = ["Infer", "OnBoard", "availability", "present"]

Infer = Callable[[Array], object]  # one image (1, C, h, w) float32, contiguous -> the vendor's only output
ARM = ("aarch64", "arm64", "ARM64")


def present(*modules: str) -> str:
    """The first of `modules` that is installed on this ARM machine, or an empty string; imports none of them."""
    found = (name for name in modules if platform.machine() in ARM and importlib.util.find_spec(name) is not None)
    return next(found, "")


def availability(recipe: _venv.Recipe, *modules: str) -> Availability:
    """Ready where a board package is installed, to run what was built elsewhere, or where the compiler's environment is."""
    board = present(*modules)
    return Availability(available=True, version=f"{board} on the board") if board else _venv.availability(recipe)


@dataclass(frozen=True)
class OnBoard(_estimate.Estimated):
    """A session whose inferences run on the chip; its batch is one, so images follow each other."""

    artifact: Artifact
    package: str
    infer: Infer

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, float32, for any number of images.

        Raises:
            TargetUnavailable: the vendor's package failed, or returned something else than the artifact promises.
        """
        feed, (output,) = self.artifact.inputs[0], self.artifact.outputs
        images = np.ascontiguousarray(inputs[feed.name], dtype=np.float32)
        return {
            output.name: np.concatenate([self._one(images[i : i + 1], output.shape[1:]) for i in range(len(images))])
        }

    def _one(self, image: Array, shape: tuple[int, ...]) -> Array:
        try:
            raw = self.infer(image)
        except Exception as error:  # whatever a vendor's library raises
            raise self._failure("must run the model", f"{type(error).__name__}: {error}") from error
        got = np.array(raw)  # a copy: the vendors reuse their buffers
        wanted = f"{int(np.prod(shape))} values of float32"
        if got.dtype != np.float32 or got.size != np.prod(shape):
            raise self._failure(f"must return {wanted}", f"{got.dtype} {got.shape}")
        return got.reshape(1, *shape)

    def _failure(self, what: str, got: str) -> TargetUnavailable:
        where = f"{self.package} with {self.artifact.path.name}"
        return TargetUnavailable(f"{where}: {what}, got {got}.", hint="Check that the model was built for this chip.")
