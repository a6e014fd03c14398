"""The libraries the tests compare against. They are never required to run the product."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

__all__ = ["import_timm", "import_torchvision", "import_transformers"]

SHIMS = []  # torch unregisters the operators when the library object goes away


def _repair_torchvision() -> None:
    """Declare the operators that torchvision's CUDA wheel cannot load beside a CPU torch; transforms need none."""
    import torch

    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        SHIMS.append(library)


def import_timm() -> ModuleType:
    """timm, or the test is skipped."""
    _repair_torchvision()
    return pytest.importorskip("timm", reason="timm, a peer the tests compare with, is not installed")


def import_transformers() -> ModuleType:
    """transformers, or the test is skipped."""
    _repair_torchvision()
    return pytest.importorskip("transformers", reason="transformers, a peer the tests compare with, is not installed")


def import_torchvision() -> ModuleType:
    """torchvision's models, or the test is skipped."""
    _repair_torchvision()
    return pytest.importorskip(
        "torchvision.models", reason="torchvision, a peer the tests compare with, is not installed"
    )
