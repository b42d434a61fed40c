"""The class of an adapted model: layers with the methods of `PeftModel`, and with PEFT's own class behind all others.

A config may offer more methods, which the model has while such an adapter is active.

PEFT's class is there as soon as somebody has loaded PEFT, see `peft_classes.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import fx

from graphpeft.adapters import mixing
from graphpeft.adapters.given_inputs import given_in_forward
from graphpeft.graph import call_inputs, in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.around_patched import is_around
from graphpeft.model.other_names import OtherNames
from graphpeft.peft_classes import model_class, set_class
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.registry import registered


def layers_with(
    methods: tuple[Any, ...], task: TaskType | None, other_names: tuple[str, ...], offered: tuple[str, ...]
) -> dict[str, in_place.Layer | None]:
    """Returns the layers of an adapted model by their kinds."""
    return {
        "methods": _methods_layer(methods, task, other_names, offered),
        "peft": None if model_class(task) is None else _peft_layer(task),
    }


@functools.cache
def _methods_layer(
    methods: tuple[Any, ...], task: TaskType | None, other_names: tuple[str, ...], offered: tuple[str, ...]
) -> in_place.Layer:
    of_configs = {name: Offered(name) for name in offered}
    namespace = (
        of_configs
        | {name: vars(OtherNames)[name] for name in other_names}
        | {
            "__call__": methods[0].__call__,
            "forward": _forward,
            "__class__": property(_class_now, set_class),
            "_graphpeft_task": task,
        }
    )
    return in_place.Layer("methods", methods, namespace, (_methods_layer, (methods, task, other_names, offered)))


def _forward(model: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """Runs the forward of an adapted model, also where somebody calls that itself, with arguments for adapters."""
    if is_around(model) or not hasattr(model, "_peft_adapters"):
        # called by the model's patched forward: around the graph, or for longer than it was adapted
        return in_place.original_class(model).forward(model, *args, **kwargs)
    forward, state = mixing.forward_of(model), model._peft_adapters
    read = state.call_inputs
    if adapter_names is not None:
        _refuse_proxy(adapter_names)
        with model.mixed_batch(adapter_names), given_in_forward(model, args, kwargs):
            return forward(model, *args, **call_inputs.left(read, kwargs))
    if not read:
        return forward(model, *args, **kwargs)
    with given_in_forward(model, args, kwargs):
        return forward(model, *args, **call_inputs.left(read, kwargs))


def _refuse_proxy(adapter_names: Any) -> None:
    """Raises TraceError for an argument of the model's own forward, which torch.fx has put in this place."""
    if isinstance(adapter_names, fx.Proxy):
        raise TraceError(
            "torch.fx's own tracer can't call the forward of an adapted model that takes *args, **kwargs or "
            "arguments by their names alone; graphpeft.trace(model, example_inputs) gives a graph module, with the "
            "adapters' nodes"
        )


def _class_now(model: Any) -> type:
    """Returns the class of a model. If PEFT was loaded since the model was adapted, the class gets PEFT's now."""
    own = type(model)
    theirs = model_class(own._graphpeft_task)
    # a class that somebody else has derived since is left alone
    if theirs is not None and not issubclass(own, theirs) and "_graphpeft_layers" in vars(own):
        in_place.put_on(model, _peft_layer(own._graphpeft_task))
        # isinstance, which may have asked, ignores a __class__ that is the type by now
        return in_place.quiet_subclass(type(model), {})
    return own


def _peft_layer(task: TaskType | None) -> in_place.Layer:
    theirs = model_class(task)
    return _ending_in(task, () if theirs is None else (theirs,))


@functools.cache
def _ending_in(task: TaskType | None, theirs: tuple[type, ...]) -> in_place.Layer:
    return in_place.Layer("peft", (), {}, (_peft_layer, (task,)), last=theirs)


class Offered:
    """A method that the config of the first active adapter offers that has it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        for active in instance.active_adapters:
            offered = instance.peft_config[active].offers(self._name)
            if offered is not None:
                return offered
        raise AttributeError(f"{owner.__name__} has no {self._name} with its active adapters", name=self._name)


def offered_names(model: Any) -> tuple[str, ...]:
    """Returns the names of such methods of all configs, but for those of which `model` has something of its own."""
    names = {name for config_class in registered().values() for name in config_class.offered_names()}
    return tuple(sorted(name for name in names if not hasattr(model, name)))
