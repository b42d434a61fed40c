"""Functions of ``torch.jit.script``: each call is one node of a graph."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch


class Scripted:
    """A scripted function as a node's target, which can be pickled."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.__name__ = name
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scripted) and other.function is self.function

    def __hash__(self) -> int:
        return hash((Scripted, id(self.function)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        torch.jit.save(self.function, file)  # type: ignore[arg-type]
        return _loaded, (file.getvalue(), self.__name__)


def _loaded(content: bytes, name: str) -> Scripted:
    return Scripted(torch.jit.load(io.BytesIO(content)), name)
