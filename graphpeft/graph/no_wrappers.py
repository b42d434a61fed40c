"""What an adapted module says to code that takes it for one of PEFT's wrappers, and asks for what these have."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphpeft.absent_names import ABSENT_MEMBERS
from graphpeft.graph.holders import Holder

_ADVICE = {name: reason for names, reason in ABSENT_MEMBERS["layers"].items() for name in names.split(", ")}


class NoWrapper(nn.Module):
    """A module whose errors say what to use in place of what PEFT's wrappers have; nothing else differs."""

    def __getattr__(self, name: str) -> Any:
        # parameters are found here, too, and by nn.Module's function, which traces exchange
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in _ADVICE or not any(isinstance(child, Holder) for child in self._modules.values()):
                raise
            raise AttributeError(f"{error}: {_ADVICE[name]}", name=name, obj=self) from None
