"""A module's own forward as one call node, for a module that needs no trace or can't be traced.

The graph has the forward's arguments and calls the forward. Where adapters change weights, the graph reads the weights
and runs the forward on the changed ones.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import reparametrized
from graphpeft.code.source import uses_in_forward
from graphpeft.graph import in_place, overrides
from graphpeft.graph.errors import TraceError
from graphpeft.graph.forward_classes import class_of_forward, holds_own_tensor
from graphpeft.graph.kept_forwards import name_of, set_forward
from graphpeft.graph.one_at_a_time import alone_with
from graphpeft.graph.per_call import PerCall
from graphpeft.graph.recomputing import taken_along
from graphpeft.graph.template import OWN_FORWARD, SIMPLE, Template


def call_through(module: nn.Module) -> Template:
    """Returns the template of a graph that only calls `module`'s own forward, with the same arguments.

    Raises:
        TraceError: If a graph can't have the forward's arguments.
    """
    if set_forward(module) is not None and not _takes_the_same(module):
        raise TraceError(
            f"its forward was set on the instance ({name_of(set_forward(module))}) and takes other arguments than "
            "that of its class; give it the same"
        )
    return _calling(in_place.original_class(module).forward, ())


def _takes_the_same(module: nn.Module) -> bool:
    """Returns whether a forward that was set on a module takes the arguments of that of its class, by their names."""
    of_class = list(inspect.signature(in_place.original_class(module).forward).parameters)[1:]
    try:
        own = inspect.signature(cast(Any, set_forward(module))).parameters.values()
    except ValueError:  # a function in C
        return False
    takes_any = any(each.kind is each.VAR_KEYWORD for each in own)
    return takes_any or [each.name for each in own] == of_class


def call_on_weights(module: nn.Module, weight: str) -> Template:
    """Returns the template of a graph that calls `module`'s own forward on the weights that the forward's code reads.

    Args:
        module: The module.
        weight: The path of the weight that is to be among them. If the code doesn't show that it is read, all of the
            module's weights are.

    Raises:
        TraceError: If a graph can't have the forward's arguments.
    """
    if holds_own_tensor(module):
        raise TraceError(
            f"its forward was set on the instance ({name_of(set_forward(module))}) and has a tensor of the module in "
            "hand, for which no other can be put in; read it from the module in each call"
        )
    uses = uses_in_forward(class_of_forward(module))
    used = uses.read | uses.called  # a method of the weight, such as ``weight.chunk``, is called
    found = dict(module.named_parameters())
    # a weight in a container is read by a key, which the code needn't show
    containers = (nn.ParameterDict, nn.ParameterList)
    held = {path for path, inner in module.named_modules() if path in used and isinstance(inner, containers)}
    names = tuple(
        path
        for path in found
        if path.rpartition(".")[0] in held or any(path == use or use.startswith(f"{path}.") for use in used)
    )
    if weight not in names:
        names = tuple(module._parameters) if weight in module._parameters else tuple(found)
    own: Any = _any_arguments if set_forward(module) is not None else in_place.original_class(module).forward
    return _calling(own, names, as_given=True)


def _any_arguments(*args: Any, **kwargs: Any) -> None:
    """Stands for a set forward, which may take others than that of the class."""


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
    """Returns whether `forward` is decorated and so may pass its arguments to a function with other argument names."""
    own = list(inspect.signature(forward, follow_wrapped=False).parameters.values())
    takes_any = [parameter.kind is parameter.VAR_POSITIONAL for parameter in own]
    # without a name of its own for the module, it is a decorator's that doesn't tell what it wraps
    return any(takes_any) and (takes_any[0] or hasattr(forward, "__wrapped__"))


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


def on_tensors(own_forward: functools.partial[Any], tensors: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """Returns a module's own forward on `tensors`, by path, in place of the module's own."""
    module: nn.Module = own_forward.args[0]
    swap = functools.partial(_reading_alone, module, tensors)

    def forward(*args: Any, **kwargs: Any) -> Any:
        running = _READING.get() or ()
        if any(each is module for each in running):
            return own_forward(*args, **kwargs)  # the forward has called itself, and its weights are changed
        if torch.compiler.is_compiling():
            with _READING.during((*running, module)), _reading(module, tensors):
                return own_forward(*args, **kwargs)
        with taken_along(swap):
            return own_forward(*args, **kwargs)

    return forward


@contextlib.contextmanager
def _reading_alone(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Does the same as `_reading`, alone: a checkpoint may run a forward again in another thread."""
    owners = {path.rpartition(".")[0] for path in tensors}
    running = (*(_READING.get() or ()), module)
    with _READING.during(running), alone_with(module, owners), _reading(module, tensors):
        yield


_READING: PerCall[tuple[nn.Module, ...]] = PerCall("changed weights", "run the compiled model in a thread")
"""The modules whose own forwards run on other tensors now."""


@contextlib.contextmanager
def _reading(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Makes `module` and its submodules read `tensors`, by path, in place of their own tensors or overrides."""
    own, in_place_of_overrides, views = {}, [], []
    for path, tensor in tensors.items():
        owner_path, _, name = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        if overrides.stands_in(owner, name):
            in_place_of_overrides.append((owner, name, tensor))
        elif name in vars(owner):
            # FSDP1 has views of its flat parameter there, which Python reads first
            views.append((owner, name, vars(owner)[name], tensor))
        else:
            own[path] = tensor
    try:
        for owner, name, _, tensor in views:
            vars(owner)[name] = tensor
        with _read_for_now(in_place_of_overrides), reparametrized(module, own):
            yield
    finally:
        for owner, name, view, _ in views:
            vars(owner)[name] = view


@contextlib.contextmanager
def _read_for_now(places: list[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    # nested, since torch.compile can't follow an ExitStack before PyTorch 2.13
    if not places:
        yield
        return
    (owner, name, tensor), *others = places
    with overrides.read_for_now(owner, name, tensor), _read_for_now(others):
        yield
