"""What adapters read in a call: arguments that it is given for them, and what follows from its other arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphpeft.adapters.present_rows import ROWS
from graphpeft.adapters.state import Adapter, Adapters
from graphpeft.graph.call_inputs import CALL_INPUTS, PROMPT
from graphpeft.rules.config import PeftConfig


def with_derived(adapters: Adapters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the keyword arguments of a call, with those for adapters that follow from the others.

    Args:
        adapters: The model's adapters.
        args: The positional arguments of the call.
        kwargs: The keyword arguments.
    """
    deriving = _deriving(adapters)
    if not deriving:
        return kwargs
    arguments = {**dict(zip(adapters.positional, args, strict=False)), **kwargs}
    given = {**(CALL_INPUTS.get() or {}), **{name: value for name, value in kwargs.items() if value is not None}}
    # what has followed from others may follow anew, for a model inside another
    passed = {name for name, value in given.items() if not isinstance(value, Mapping)}
    found: dict[str, Any] = {}
    for adapter in deriving:
        if adapter.call_inputs <= passed:
            continue
        for name, values in adapter.config.call_inputs_from(arguments, PROMPT.get()).items():
            if name not in passed:
                found[name] = {**found.get(name, given.get(name, {})), **values}
    return {**kwargs, **found}


def _deriving(adapters: Adapters) -> list[Adapter]:
    """Returns the adapters that act in the present call, and read what follows from its arguments."""
    rows = ROWS.get()
    names = [] if adapters.are_off else adapters.acting if rows is None else rows.names
    acting = [adapters.by_name[name] for name in names]
    return [
        adapter
        for adapter in acting
        if adapter.call_inputs and type(adapter.config).call_inputs_from is not PeftConfig.call_inputs_from
    ]
