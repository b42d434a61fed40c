"""The inputs that a model's example inputs give to a submodule, from a run of a copy that stops there."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
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


def inputs_of_each(
    model: nn.Module, modules: Mapping[str, nn.Module], example_inputs: ExampleInputs
) -> dict[str, ExampleInputs]:
    """Runs a copy of the model once, and returns the inputs of the first call of each module that it reaches."""
    seen: dict[str, ExampleInputs] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in seen:
            seen[path] = _given(module, args, kwargs)

    _run_with_hooks(model, modules, example_inputs, note)
    return seen


Way = frozenset[tuple[str, Any]]
"""The optional arguments of a call that haven't their defaults: names, with the value of a flag or else its type."""


def ways_of_calling(
    model: nn.Module, modules: Mapping[str, nn.Module], example_inputs: ExampleInputs
) -> dict[str, list[Way]]:
    """Runs a copy of the model on the example inputs and returns in which ways each module is called."""
    optional = {path: defaults(module.forward) for path, module in modules.items()}
    ways: dict[str, list[Way]] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        way = frozenset(
            (name, given[name] if isinstance(given[name], bool | str) else type(given[name]))
            for name, default in optional[path].items()
            if name in given and not is_same(given[name], default)
        )
        known = ways.setdefault(path, [])
        if way not in known:
            known.append(way)

    _run_with_hooks(model, modules, example_inputs, note)
    return ways


def _run_with_hooks(
    model: nn.Module, modules: Mapping[str, nn.Module], example_inputs: ExampleInputs, note: Callable[..., None]
) -> None:
    """Runs a copy of the model; `note` is given the path, the module and the arguments of each call of the modules."""
    # a copy, since modules may change themselves when they run
    copied, inside = copy.deepcopy((model, dict(modules)))
    for path, module in inside.items():
        module.register_forward_pre_hook(functools.partial(note, path), with_kwargs=True)
    args, kwargs = split_inputs(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        copied(*(args or ()), **kwargs)


def defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """Returns the arguments of a forward that may be left out, with their defaults."""
    parameters = inspect.signature(forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty or p.kind in _ANY_NUMBER}


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
