"""The part of a config that is about calls of an adapted model, and about its methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from graphpeft.rules.present_call import PresentCall


class ConfigInCalls:
    """The part of `PeftConfig` that is about calls."""

    runs_model: ClassVar[bool] = False
    """Whether `call_inputs_from` runs the model, in which other adapters act."""

    goes_on_from_caches: ClassVar[bool] = True
    """Whether a call may go on from keys and values that earlier calls have kept; if not, `generate` keeps none."""

    adds_to_caches: ClassVar[bool] = False
    """Whether it has layers of its own in a cache, so that `generate` keeps nothing where a cache can't have these."""

    is_by_token: ClassVar[bool] = False
    """Whether what `call_inputs_from` returns is for each token of the call, so that layers may be given no others."""

    adds_tokens: ClassVar[bool] = False
    """Whether layers of the model are given more tokens than the call has."""

    offered: ClassVar[type[Any] | None] = None
    """A class, made of the config, whose methods an adapted model has, too, while an adapter with it is active."""

    @classmethod
    @functools.cache
    def offered_names(cls) -> frozenset[str]:
        """Returns the names of these methods."""
        members = () if cls.offered is None else dir(cls.offered)
        return frozenset(name for name in members if not name.startswith("_"))

    def offers(self, name: str) -> Callable[..., Any] | None:
        """Returns the method of this name that an adapted model has, or None.

        Args:
            name: The name.
        """
        if self.offered is None or name not in self.offered_names():
            return None
        return getattr(self.offered(self), name)

    def apart_from(self, others: Mapping[str, Any]) -> str | None:
        """Returns why the adapter can't act together with others, or None.

        Args:
            others: The configs of the others, by name.
        """
        name = next((name for name, other in others.items() if self.is_by_token and other.adds_tokens), None)
        return None if name is None else f"{name!r} gives layers more tokens than the call has"

    def call_inputs_from(self, call: PresentCall) -> Mapping[str, Any]:
        """Returns those of its rules' `call_inputs` that follow from the other arguments of a call.

        A call that passes one itself keeps that. Each value is a mapping, whose keys tell apart what adapters read that
        need different ones.

        Args:
            call: The call of the model.
        """
        return {}
