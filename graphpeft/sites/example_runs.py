"""What the example inputs of a model give to a module inside it, by a run of a copy that ends there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.trace import ExampleInputs, split_inputs


class _ReachedError(Exception):
    """Ends a run of the model as soon as it reaches a module."""


def inputs_of(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """Runs the model on the example inputs and returns those that reach `module` first; the model stays as it is."""
    seen: list[ExampleInputs] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_given(module, args, kwargs))
        raise _ReachedError

    _run_until(model, module, example_inputs, lambda copied: copied.register_forward_pre_hook(stop, with_kwargs=True))
    return seen[0]


def call_of(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> tuple[ExampleInputs, Any]:
    """Runs the model as `inputs_of` does, and returns what `module` was given, and what it returned."""
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
    """Runs a copy of the model with a hook on `module` that ends the run, which `stop_at` registers."""
    # in a copy, whatever the modules on the way do to themselves is lost
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
    raise TraceError("the example inputs don't reach it; pass example_inputs for which the model runs it")
