"""Arguments that a model is given in a call beside those of its forward, and that any graph inside reads by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from graphpeft.graph.per_call import PerCall
from graphpeft.graph.recomputing import taken_along

CALL_INPUTS: PerCall[Mapping[str, Any]] = PerCall("arguments", "pass them to the compiled model itself")
"""Those of the present call, by name."""


class CallInput(NamedTuple):
    """One of them, as a graph reads it.

    Attributes:
        name: Its name.
    """

    name: str


def given(read: Mapping[str, bool], kwargs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Lets graphs read arguments of a call.

    Args:
        read: The names of those that adapters read, with whether the model's forward takes them, too.
        kwargs: The keyword arguments of the call.
    """
    own = {name: value for name, value in kwargs.items() if name in read}
    # an adapted model may be a part of another one
    present = {**(CALL_INPUTS.get() or {}), **own}
    return taken_along(functools.partial(CALL_INPUTS.during, present)) if own else contextlib.nullcontext()


def left(read: Mapping[str, bool], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments that the model's forward is to have; arguments as for `given`."""
    return {name: value for name, value in kwargs.items() if read.get(name, True)}


def call_input(name: str) -> Any:
    """Returns an argument of the present call of the model.

    Raises:
        TypeError: If the model isn't given it.
    """
    given = CALL_INPUTS.get()
    if given is None or name not in given:
        raise TypeError(f"an active adapter needs {name} in each call: model(…, {name}=…)")
    return given[name]
