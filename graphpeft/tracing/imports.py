"""Runs the code of Python modules that a forward imports, but outside the trace.

The names that an imported module binds outlive the trace: ``from torch import arange`` must bind the real function, and
``BASE = torch.ones(4)`` a tensor.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from graphpeft.transaction import at_end_of

Outside = Callable[[], AbstractContextManager[Any]]
"""Makes a context that runs code outside the trace."""


@contextlib.contextmanager
def imports_run(outside: Outside, is_concerned: Callable[[], bool]) -> Iterator[None]:
    """Runs the code of imported Python modules `outside` a trace."""
    finder = _Finder(outside, is_concerned)
    with contextlib.ExitStack() as stack:
        at_end_of(stack, _take_out, finder)
        sys.meta_path.insert(0, finder)
        yield


def _take_out(finder: _Finder) -> None:
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Returns the specs of the other finders, with loaders that run module code outside the trace."""

    def __init__(self, outside: Outside, is_concerned: Callable[[], bool]) -> None:
        self._outside, self._is_concerned = outside, is_concerned

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not self._is_concerned():
            return None
        for finder in [other for other in sys.meta_path if other is not self and hasattr(other, "find_spec")]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self._outside)
                return spec
        return None


class _Loader(Loader):
    """Wraps a module's loader to run the module's code outside the trace. The module sees only its own loader."""

    def __init__(self, loader: Any, outside: Outside) -> None:
        self._loader, self._outside = loader, outside

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        spec.loader = self._loader
        try:
            return self._loader.create_module(spec)
        finally:
            spec.loader = self

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        with self._outside():
            self._loader.exec_module(module)
