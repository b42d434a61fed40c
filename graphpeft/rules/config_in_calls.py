"""What a config has to do with calls of an adapted model, and with its methods."""

from __future__ import annotations

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

    offered: ClassVar[tuple[str, ...]] = ()
    """The names of the config's methods that an adapted model has, too, while such an adapter is active."""

    def offers(self, name: str) -> Callable[..., Any] | None:
        """Returns the method of this name that an adapted model has, or None.

        Args:
            name: The name.
        """
        return getattr(self, name) if name in self.offered else None

    def call_inputs_from(self, call: PresentCall) -> Mapping[str, Any]:
        """Returns those of its rules' `call_inputs` that follow from the other arguments of a call.

        A call that passes one itself keeps that. Each value is a mapping, whose keys tell apart what adapters read that
        need different ones.

        Args:
            call: The call of the model.
        """
        return {}
