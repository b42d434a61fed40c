"""The inputs that a model's example inputs give to a submodule, from a run of a copy that stops there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphpeft.graph.errors import TraceError
from graphpeft.graph.guards import is_same
from graphpeft.graph.inputs import ExampleInputs, split_inputs


class NotReachedError(TraceError):
    """The example inputs of a model don't reach a module."""


class _ReachedError(Exception):
    """Ends a run of the model as soon as it reaches a module."""


def inputs_of(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """Runs a copy of the model on the example inputs and returns the inputs of the first call of `module`."""
    seen: list[ExampleInputs] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_given(module, args, kwargs))
        raise _ReachedError

    _run_until(model, module, example_inputs, lambda copied: copied.register_forward_pre_hook(stop, with_kwargs=True))
    return seen[0]


def inputs_beyond_defaults(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs | None:
    """Returns `inputs_of` if an optional argument of the module's forward gets a non-default value, else None."""
    parameters = inspect.signature(module.forward).parameters
    optional = {name: p.default for name, p in parameters.items() if p.default is not p.empty or p.kind in _ANY_NUMBER}
    if not optional:
        return None
    try:
        inputs = inputs_of(model, module, example_inputs)
    except NotReachedError:
        return None
    args, kwargs = split_inputs(inputs)
    given = inspect.signature(module.forward).bind(*(args or ()), **kwargs).arguments
    return inputs if any(name in given and not is_same(given[name], optional[name]) for name in optional) else None


_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_of(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> tuple[ExampleInputs, Any]:
    """Runs a copy of the model as `inputs_of` does, and returns the inputs and the output of `module`."""
    seen: list[tuple[ExampleInputs, Any]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((_given(module, args, kwargs), output))
        raise _ReachedError

    _run_until(model, module, example_inputs, lambda copied: copied.register_forward_hook(stop, with_kwargs=True))
    return seen[0]


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExampleInputs:
    return {**inspect.signature(module.forward).bind(*args, **kwargs).arguments} if kwargs else args


def _run_until(
    model: nn.Module, module: nn.Module, example_inputs: ExampleInputs, stop_at: Callable[[nn.Module], Any]
) -> None:
    """Runs a copy of the model with a hook on `module`, registered by `stop_at`, that ends the run."""
    # a copy, since modules may change themselves when they run
    copied = copy.deepcopy({"model": model, "module": module})
    hook = stop_at(copied["module"])
    args, kwargs = split_inputs(example_inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copied["model"](*(args or ()), **kwargs)
    except _ReachedError:
        return
    finally:
        hook.remove()
    raise NotReachedError("the example inputs don't reach it; pass example_inputs for which the model runs it")
