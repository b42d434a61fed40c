"""The modes of submodules after ``train()`` and ``eval()``, for modules whose class overrides these methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from graphpeft.graph import guards
from graphpeft.graph.paths import join


class OwnModes(NamedTuple):
    """Whether submodules are in training after a module's own ``train`` and ``eval``, by path.

    Attributes:
        by_train: The modes after ``train(False)`` and after ``train(True)``.
        by_eval: The modes after ``eval()``.
        asked: The plain attributes of the module that the methods have read, with their values.
    """

    by_train: tuple[Mapping[str, bool], Mapping[str, bool]]
    by_eval: Mapping[str, bool]
    asked: Mapping[str, Any]

    def refuse_others(self, module: nn.Module, path: str) -> None:
        """Raises GuardError if an attribute that the methods have read has another value in `module` now."""
        for name, value in self.asked.items():
            if vars(module).get(name, value) != value:
                guards.expect(vars(module)[name], value, f"{join(path, name)}, which train() and eval() there ask for")
