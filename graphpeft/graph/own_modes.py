"""Which modules are in training after `train` and `eval` of modules whose class has these of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from graphpeft.graph import guards
from graphpeft.graph.paths import join


class OwnModes(NamedTuple):
    """Whether modules are in training after a module's own methods, by their paths in it.

    Attributes:
        by_train: The modes after ``train(False)`` and after ``train(True)``.
        by_eval: Those after ``eval()``.
        asked: The plain attributes of the module that the methods have read.
    """

    by_train: tuple[Mapping[str, bool], Mapping[str, bool]]
    by_eval: Mapping[str, bool]
    asked: Mapping[str, Any]

    def refuse_others(self, module: nn.Module, path: str) -> None:
        """Raises GuardError if an attribute that the methods have read is another one in `module` now."""
        for name, value in self.asked.items():
            if vars(module).get(name, value) != value:
                guards.expect(vars(module)[name], value, f"{join(path, name)}, which train() and eval() there ask for")
