"""Puts a replacement in the place of a pattern's operations in a graph."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.proxy import TraceError as ProxyError

from graphpeft._torch import fake_tensor
from graphpeft.graph.calls import CALLS, Call, calls_of
from graphpeft.graph.ops.linear import transpose_of
from graphpeft.graph.settings import Reads, Setting, add_check
from graphpeft.graph.tags import REWRITE
from graphpeft.graph.template import ABSENT, FIXED, LINE, VALUE
from graphpeft.rewrites.matching import Occurrence
from graphpeft.rewrites.pattern import RewriteError, layer
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.sharing import needs_copy
from graphpeft.rewrites.spellings import bound
from graphpeft.rewrites.values import Attribute, Form
from graphpeft.rules.code_in_graphs import RuleError, RuleTracer


def held(path: str) -> Any:
    """Reads, in a replacement, a tensor or a number of the module in whose forward the match is.

    Args:
        path: Its path in that module, such as ``"embed.weight"``.

    Returns:
        Its value, for the code of the replacement.

    Raises:
        RewriteError: If the module has nothing at this path.
        RuntimeError: Outside of a replacement.

    Examples:
        >>> tied = Rewrite(lambda x, w: F.linear(x, w), lambda x: F.linear(x, held("0.weight")))
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
        >>> len(tied(model, inside=[""]).matches)
        1
    """
    running = _RUNNING.get()
    if running is None:
        raise RuntimeError("held() is called in replacements")
    tracer, reader = running
    if not reader.has(path):
        raise RewriteError(f"the replacement reads held({path!r}), and {type(reader.root).__name__} has no {path}")
    return fx.Proxy(tracer.graph.create_node("get_attr", path), tracer)


_RUNNING: ContextVar[tuple[RuleTracer, Reader] | None] = ContextVar("running", default=None)
"""The tracer of the replacement that runs at present in this thread, and the reader of its match."""


def replace_all(
    graph: fx.Graph, reader: Reader, found: list[Occurrence], code: Callable[..., Any], name: str, is_root: bool
) -> None:
    """Replaces all occurrences in a graph, which must be a copy that nothing else uses."""
    nodes = dict(zip(reader.graph.nodes, graph.nodes, strict=True))
    names: dict[str, str] = {}
    for occurrence in found:
        result = nodes[occurrence.result]
        new, added = _emitted(graph, occurrence, nodes, code, name, reader)
        if needs_copy(occurrence, new, nodes, added, reader, is_root):
            new = _copied(result, new, name, reader)
        for each in occurrence.state.nodes:
            # the options on which a layer's own graph depends
            new.meta |= {key: nodes[each].meta[key] for key in (FIXED, ABSENT) if key in nodes[each].meta}
        result.replace_all_uses_with(new)
        names[result.name] = new.name
        nodes[occurrence.result] = new
        _erase(graph, {nodes[each] for each in occurrence.state.nodes} - {new} | {result})
    for node in reversed(graph.nodes):
        # a transpose of a tensor stays until its last reader is replaced
        if not node.users and (node.op == "get_attr" or transpose_of(node) is not None):
            graph.erase_node(node)
    _rename_in_calls(graph, names)
    # the graph decides on these itself where it is one for each mode
    assumed = {path: value for each in found for path, value in each.state.assumes.items() if path != "training"}
    settings = [Setting(path, value, f"{path}, on which the rewrite {name} depends") for path, value in assumed.items()]
    add_check(graph, Reads(tuple(settings), ()))


def _emitted(
    graph: fx.Graph,
    occurrence: Occurrence,
    nodes: Mapping[fx.Node, fx.Node],
    code: Callable[..., Any],
    name: str,
    reader: Reader,
) -> tuple[fx.Node, set[fx.Node]]:
    """Runs the replacement on the values of an occurrence, in front of its result."""
    result, tracer, before = nodes[occurrence.result], RuleTracer(graph), set(graph.nodes)
    called = {wanted: str(node.target) for wanted, node in occurrence.state.layers.items()}
    with graph.inserting_before(result):
        given = {key: _as_proxy(value, nodes, tracer) for key, value in _asked(code, occurrence).items()}
        token = _RUNNING.set((tracer, reader))
        try:
            with torch.enable_grad():
                value = code(**given)
        except (RuleError, ProxyError) as error:
            raise RewriteError(f"the replacement of {name} can't stand in a graph: {error}") from error
        finally:
            _RUNNING.reset(token)
        if not isinstance(value, fx.Proxy):
            raise RewriteError(f"the replacement of {name} returns a {type(value).__name__}, and no value of the graph")
        new = value.node  # that of an attribute is made now
    for node in [node for node in graph.nodes if node not in before]:
        if isinstance(node.target, layer):
            call = _as_call(graph, node, called)
            new = call if node is new else new
    for node in [node for node in graph.nodes if node not in before]:
        if not node.users and node is not new:
            graph.erase_node(node)
            continue
        _describe(node, result, name, reader)
    return new, set(graph.nodes) - before


def _copied(result: fx.Node, new: fx.Node, name: str, reader: Reader) -> fx.Node:
    with result.graph.inserting_before(result):
        copy = result.graph.call_method("clone", (new,))
    _describe(copy, result, name, reader)
    return copy


def _describe(node: fx.Node, result: fx.Node, name: str, reader: Reader) -> None:
    """Gives a new node what is known of it."""
    node.meta = {REWRITE: name, CALLS: calls_of(result), **_where(result)}
    _give_example(node, reader, name)


def _where(result: fx.Node) -> dict[str, Any]:
    return {LINE: result.meta[LINE]} if LINE in result.meta else {}


def _asked(code: Callable[..., Any], occurrence: Occurrence) -> dict[str, Any]:
    """Returns the values for which a replacement asks by the names of its arguments."""
    parameters, values = inspect.signature(code).parameters, occurrence.values
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return values
    lacking = [key for key, each in parameters.items() if key not in values and each.default is each.empty]
    if lacking:
        raise RewriteError(
            f"the replacement asks for {lacking[0]}, and the pattern's arguments are {', '.join(values)}; name one of "
            "them, or give it a default"
        )
    return {key: values[key] for key in parameters if key in values}


def _as_proxy(value: Any, nodes: Mapping[fx.Node, fx.Node], tracer: RuleTracer) -> Any:
    if isinstance(value, fx.Node):
        return fx.Proxy(nodes[value], tracer)
    if isinstance(value, Attribute):
        return fx.Proxy(tracer.graph.create_node("get_attr", value.path), tracer)
    if isinstance(value, tuple):
        return tuple(_as_proxy(part, nodes, tracer) for part in value)
    if isinstance(value, Form):
        given = {key: _as_proxy(part, nodes, tracer) for key, part in value.arguments.items()}
        return _SPELLED[value.function](**given)
    return value


_SPELLED: dict[str, Callable[..., Any]] = {
    "transpose": lambda input, dims: input.transpose(*dims),
    "linear": lambda input, weight, bias: torch.nn.functional.linear(input, weight, bias),
    "matmul": lambda input, other: input @ other,
}
"""The forms that no node of the model computes, as code."""


def _as_call(graph: fx.Graph, node: fx.Node, called: Mapping[layer, str]) -> fx.Node:
    """Puts the call of the module that was found in the place of the call of a pattern's layer."""
    wanted: Any = node.target
    if wanted not in called:
        raise RewriteError(f"the replacement calls layer({wanted.__name__}), and the pattern doesn't")
    with graph.inserting_before(node):
        call = graph.call_module(called[wanted], node.args, node.kwargs)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call


def _erase(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if node in nodes and not node.users:
            graph.erase_node(node)


def _rename_in_calls(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Lets the calls of modules that a flat graph knows give and return the new values."""

    def renamed(name: str | None) -> str | None:
        while name is not None and name in names:
            name = names[name]
        return name

    known: dict[Call, Call] = {}
    for node in graph.nodes:
        for call in calls_of(node):
            if call not in known:
                arguments = {key: renamed(name) for key, name in call.arguments.items()}
                known[call] = dataclasses.replace(
                    call, arguments=arguments, returned=tuple(map(renamed, call.returned))
                )
        if calls_of(node):
            node.meta[CALLS] = tuple(known[call] for call in calls_of(node))


def _give_example(node: fx.Node, reader: Reader, name: str) -> None:
    """Gives a new node the example of its value, if those of its arguments are known."""
    inputs = [source.meta.get(VALUE) for source in node.all_input_nodes]
    mode = next((value.fake_mode for value in inputs if isinstance(value, fake_tensor.FakeTensor)), None)
    if node.op == "get_attr":
        value = reader.read(str(node.target))
        node.meta[VALUE] = value
        return
    is_of_pytorch = node.op == "call_method" or (node.op == "call_function" and isinstance(bound(node).function, str))
    if mode is None or not is_of_pytorch or any(VALUE not in source.meta for source in node.all_input_nodes):
        return

    def fake(source: fx.Node) -> Any:
        value = source.meta[VALUE]
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, fake_tensor.FakeTensor)
        return mode.from_tensor(value) if is_real else value

    args, kwargs = map_arg((node.args, node.kwargs), fake)
    target: Any = node.target
    try:
        with mode, torch.no_grad():
            value = (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            )
    except (RuntimeError, TypeError, ValueError) as error:
        raise RewriteError(f"the replacement of {name} fails on the example: {error}") from error
