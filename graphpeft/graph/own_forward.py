"""A module's own forward as one call of a graph: for what needs no trace, or can't be traced.

The graph has the forward's arguments, and calls it. Where weights are to be changed, it reads these and lets the
forward run on what has become of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import reparametrized
from graphpeft.code.source import uses_in_forward
from graphpeft.graph import in_place, overrides
from graphpeft.graph.errors import TraceError
from graphpeft.graph.recomputing import taken_along
from graphpeft.graph.template import OWN_FORWARD, SIMPLE, Template


def call_through(module: nn.Module) -> Template:
    """Returns the template of a graph with the arguments of `module`'s own forward, which only calls it.

    Raises:
        TraceError: If a graph can't have its arguments.
    """
    return _calling(in_place.original_class(module).forward, ())


def call_on_weights(module: nn.Module) -> Template:
    """Returns the template of a graph that calls `module`'s own forward on the weights that it reads by itself.

    Raises:
        TraceError: If a graph can't have its arguments.
    """
    read = uses_in_forward(in_place.original_class(module)).read
    found = dict(module.named_parameters())
    names = tuple(path for path in found if path in read) or tuple(module._parameters)
    return _calling(in_place.original_class(module).forward, names, as_given=True)


@functools.lru_cache(maxsize=256)
def _calling(forward: Callable[..., Any], weights: tuple[str, ...], as_given: bool = False) -> Template:
    graph = fx.Graph()
    args, given, more = _arguments_as_given(graph) if as_given and _hides(forward) else _arguments(graph, forward)
    own_forward = graph.create_node("get_attr", OWN_FORWARD, name="own_forward")
    if weights:
        read = {path: graph.create_node("get_attr", path) for path in weights}
        own_forward = graph.call_function(on_tensors, (own_forward, read))
    graph.output(graph.call_function(call, (own_forward, args, given, *more)))
    return Template((graph,), shared=True)


def _hides(forward: Callable[..., Any]) -> bool:
    """Returns whether `forward` is decorated, so that it may hand its arguments on to a function with other names."""
    own = inspect.signature(forward, follow_wrapped=False).parameters.values()
    return any(p.kind is p.VAR_POSITIONAL for p in own) and hasattr(forward, "__wrapped__")


_Arguments = tuple[Any, dict[str, fx.Node], list[fx.Node]]


def _arguments_as_given(graph: fx.Graph) -> _Arguments:
    """Adds what a call gives by position and what it gives by name, whichever names there are."""
    args = graph.create_node("placeholder", "*args", name="args")
    return args, {}, [graph.create_node("placeholder", "**kwargs", name="kwargs")]


def _arguments(graph: fx.Graph, forward: Callable[..., Any]) -> _Arguments:
    """Adds each argument of `forward`."""
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
    """Calls `function` with positional arguments, those by name, and further ones by name."""
    return function(*args, **given, **more)


def on_tensors(own_forward: functools.partial[Any], tensors: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """Returns a module's own forward as one that reads `tensors`, by their paths, in place of the module's own."""
    module: nn.Module = own_forward.args[0]
    swap = functools.partial(_reading, module, tensors)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            with _reading(module, tensors):
                return own_forward(*args, **kwargs)
        with taken_along(swap):
            return own_forward(*args, **kwargs)

    return forward


@contextlib.contextmanager
def _reading(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Lets `module`, and those inside it, read `tensors`, by their paths, in place of what they read otherwise."""
    own, in_place_of_overrides = {}, []
    for path, tensor in tensors.items():
        owner_path, _, name = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        if overrides.stands_in(owner, name):
            in_place_of_overrides.append((owner, name, tensor))
        else:
            own[path] = tensor
    with _read_for_now(in_place_of_overrides), reparametrized(module, own):
        yield


@contextlib.contextmanager
def _read_for_now(places: list[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    # one inside of the other, since torch.compile can't follow a stack of contexts before 2.13
    if not places:
        yield
        return
    (owner, name, tensor), *others = places
    with overrides.read_for_now(owner, name, tensor), _read_for_now(others):
        yield
