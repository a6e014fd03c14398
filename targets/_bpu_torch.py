"""Inert stand-in for torch inside the BPU environment: the mapper imports it when it loads and uses none of it for ONNX.

The real package would add 776 MB. Any submodule imports; any name is a class that does nothing.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


class Anything(type):
    """A class whose unknown attributes are more of the same."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert


class Inert(metaclass=Anything):
    """Accepts every call; as a decorator it returns what it decorates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()


class Module(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Inert,), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every ``torch.x.y``."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torch.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


if __name__ == "torch":  # where it is installed under that name
    sys.meta_path.append(Finder())
    __path__: list[str] = []
    __version__ = "1.12.1"
    sys.modules[__name__].__class__ = Module
