"""Where virtual tokens go at the boundary of a forward, as nodes of its graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from graphpeft.sites.site import CallSite


class Placement(ABC):
    """Where virtual tokens go at a boundary; a frozen value.

    Attributes:
        spends: The arguments by which nobody can tell any more that a sequence begins, once tokens are placed.
    """

    spends: ClassVar[tuple[str, ...]] = ()

    @property
    def asks(self) -> tuple[str, ...]:
        """The names of arguments that the module gets for it, beside its own."""
        return ()

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take virtual tokens, or None."""
        return None

    @abstractmethod
    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Returns the new values of arguments, by name; it is run on proxies.

        Args:
            prompt: The virtual tokens, (tokens, dim) or (batch, tokens, dim).
            inputs: The arguments by name.
            word_embeddings: The module that embeds tokens, or None in a scope.
            config: The model's config, or None in a scope.
        """
        ...

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the new value of the module's output; by default, the output."""
        return output
