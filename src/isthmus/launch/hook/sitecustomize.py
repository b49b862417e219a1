"""Starts modules of Isthmus within a Python program once that has imported torch. Python imports this at its start, for
its folder is on the path of the program; it imports nothing of torch or Isthmus before the program does, and then the
sitecustomize that it hides."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would slow down every start
_MODULES = "ISTHMUS_WITH_TORCH"
"""Of the environment: modules, with commas between them, each with a function `start()`."""


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as it would be found, and starts what the environment names once it is loaded."""

    def __init__(self) -> None:
        self._loader: Any = None
        self._looking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "torch" or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec("torch")
        finally:
            self._looking = False
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self._loader  # pyright: ignore[reportOptionalMemberAccess]
        self._loader.exec_module(module)
        # Loaded only now: every Python that the program starts runs this file, and few of them import torch.
        for name in os.environ[_MODULES].split(","):
            importlib.import_module(name).start()


def _import_what_is_hidden() -> None:
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]  # noqa: PTH100
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get(_MODULES):
    sys.meta_path.insert(0, _AfterTorch())
_import_what_is_hidden()
