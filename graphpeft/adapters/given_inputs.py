"""The inputs of adapters in a call: arguments that it is given for them, and values that follow from others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from graphpeft.adapters.mixing import forward_of
from graphpeft.adapters.present_rows import ROWS
from graphpeft.adapters.state import Adapter, Adapters, adapters_of
from graphpeft.graph import call_inputs
from graphpeft.graph.call_inputs import CALL_INPUTS, PROMPT
from graphpeft.graph.call_values import PerCall
from graphpeft.graph.holders import value_at
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.present_call import PresentCall

_DERIVED: PerCall[object] = PerCall("model whose inputs are known", "call the model itself, and not its forward")
"""The adapters of the model whose call has derived what they read, until its forward runs."""

_NONE = object()


@contextlib.contextmanager
def given_in_call(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Makes readable what adapters read in a call of a model, until its forward has run."""
    state = _known(model)
    with call_inputs.given(state.call_inputs, _with_derived(model, state, args, kwargs)), _DERIVED.during(state):
        yield


@contextlib.contextmanager
def given_in_forward(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Does the same for the forward itself, unless its call has done so."""
    state = _known(model)
    known = kwargs if _DERIVED.get() is state else _with_derived(model, state, args, kwargs)
    with call_inputs.given(state.call_inputs, known), _DERIVED.during(_NONE):
        yield


def _known(model: Any) -> Adapters:
    state = adapters_of(model)
    assert state is not None
    return state


def _with_derived(model: Any, adapters: Adapters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the keyword arguments of a call, with those for adapters that follow from the others."""
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
        run = functools.partial(_run, model, adapters, args, kwargs, found)
        parameters_at = functools.partial(_parameters_at, model, adapter)
        call = PresentCall(model, arguments, PROMPT.get(), parameters_at, run, model.training)
        for name, values in adapter.config.call_inputs_from(call).items():
            if name not in passed:
                found[name] = {**found.get(name, given.get(name, {})), **values}
    return {**kwargs, **found}


def _deriving(adapters: Adapters) -> list[Adapter]:
    """Returns the adapters that act in the present call, and read what follows from its arguments.

    Values that need a run of the model come last, since the others act in it.
    """
    rows = ROWS.get()
    names = [] if adapters.are_off else adapters.acting if rows is None else rows.names
    acting = [adapters.by_name[name] for name in names]
    deriving = [
        adapter
        for adapter in acting
        if adapter.call_inputs and type(adapter.config).call_inputs_from is not PeftConfig.call_inputs_from
    ]
    return [each for each in deriving if not each.config.runs_model] + [
        each for each in deriving if each.config.runs_model
    ]


def _run(
    model: Any,
    adapters: Adapters,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    found: Mapping[str, Any],
    inputs: Mapping[str, Any],
    **others: Any,
) -> Any:
    """Runs a model's forward with other inputs for adapters, and other arguments."""
    read = adapters.call_inputs
    named = set(adapters.positional[: len(args)])
    kept = [others.get(name, value) for name, value in zip(adapters.positional, args, strict=False)]
    more = {**kwargs, **{name: value for name, value in others.items() if name not in named}}
    with call_inputs.given(read, {**kwargs, **found, **inputs}):
        return forward_of(model)(model, *kept, *args[len(kept) :], **call_inputs.left(read, more))


def _parameters_at(model: Any, adapter: Adapter, number: int) -> Mapping[str, torch.Tensor]:
    adapted = adapter.sites[number]
    owner = model.get_submodule(adapted.site.owner)
    return {local: value_at(owner, name) for local, name in adapted.names.items() if local in adapted.specs}
