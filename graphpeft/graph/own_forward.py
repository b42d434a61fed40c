"""A module's own forward as one call node, for a module that needs no trace or can't be traced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.fx as fx
from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_forwards import name_of, patched_forward
from graphpeft.graph.template import OWN_FORWARD, SIMPLE, Template


def call_through(module: nn.Module) -> Template:
    """Returns the template of a graph that only calls `module`'s own forward, with the same arguments."""
    if patched_forward(module) is not None and not _takes_the_same(module):
        raise TraceError(
            f"its forward was set on the instance ({name_of(patched_forward(module))}) and takes other arguments than "
            "that of its class; give it the same"
        )
    return _calling(in_place.original_class(module).forward)


@functools.cache
def own_code() -> Template:
    """Returns what stands for the graph of a module that runs its own code, with changed weights."""
    graph = fx.Graph()
    return _called(graph, *_arguments_as_given(graph))


def _takes_the_same(module: nn.Module) -> bool:
    """Returns whether a module's patched forward takes the arguments of its class's forward, by their names."""
    of_class = list(inspect.signature(in_place.original_class(module).forward).parameters)[1:]
    try:
        own = inspect.signature(cast(Any, patched_forward(module))).parameters.values()
    except ValueError:  # a function in C
        return False
    takes_any = any(each.kind is each.VAR_KEYWORD for each in own)
    return takes_any or [each.name for each in own] == of_class


@functools.lru_cache(maxsize=256)
def _calling(forward: Callable[..., Any]) -> Template:
    graph = fx.Graph()
    return _called(graph, *_arguments(graph, forward))


def _called(graph: fx.Graph, args: Any, given: dict[str, fx.Node], more: list[fx.Node]) -> Template:
    own_forward = graph.create_node("get_attr", OWN_FORWARD, name="own_forward")
    graph.output(graph.call_function(call, (own_forward, args, given, *more)))
    return Template((graph,), shared=True)


_Arguments = tuple[Any, dict[str, fx.Node], list[fx.Node]]


def _arguments_as_given(graph: fx.Graph) -> _Arguments:
    """Adds placeholders for ``*args`` and ``**kwargs``, which take arguments of any names."""
    args = graph.create_node("placeholder", "*args", name="args")
    return args, {}, [graph.create_node("placeholder", "**kwargs", name="kwargs")]


def _arguments(graph: fx.Graph, forward: Callable[..., Any]) -> _Arguments:
    """Adds a placeholder for each argument of `forward`."""
    args: list[fx.Node] = []
    given: dict[str, fx.Node] = {}
    more: list[fx.Node] = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        placeholder = _placeholder(graph, parameter)
        if parameter.kind is parameter.VAR_KEYWORD:
            more.append(placeholder)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            raise TraceError(f"its forward takes *{parameter.name}, whose values have no names")
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(placeholder)
        else:
            given[parameter.name] = placeholder
    return tuple(args), given, more


def _placeholder(graph: fx.Graph, parameter: inspect.Parameter) -> fx.Node:
    if parameter.kind is parameter.VAR_KEYWORD:
        return graph.create_node("placeholder", f"**{parameter.name}", name=parameter.name)
    if parameter.default is parameter.empty:
        return graph.placeholder(parameter.name)
    if not isinstance(parameter.default, SIMPLE):
        raise TraceError(
            f"the default of its argument {parameter.name!r} is {parameter.default!r}, which no graph holds"
        )
    return graph.placeholder(parameter.name, default_value=parameter.default)


def call(
    function: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any], more: Mapping[str, Any] = {}
) -> Any:
    """Calls `function` with positional arguments, keyword arguments, and the further ones of its ``**kwargs``."""
    return function(*args, **given, **more)
