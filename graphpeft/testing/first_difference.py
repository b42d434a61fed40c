"""Finds the first node of a graph whose value differs from its value in an equivalent model."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphpeft._torch import pytree
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.template import template_of
from graphpeft.testing.comparing import difference, opened
from graphpeft.testing.lines import lines_of
from graphpeft.testing.runs import run, seed_generators

Values = dict[Hashable, Any]
"""Values by the name of their node, or by the path of the module that returned them and the index of the call."""


def first_difference(model: nn.Module, rewritten: nn.Module, inputs: ExampleInputs, tolerance: float = 0.0) -> str:
    """Returns the nodes of a graph between the last values equal to the model's and the first different one, as text.

    A different value whose effects are all equal again is ignored.
    """
    graph = graph_of(rewritten)
    if graph is None:
        return f"the rewritten model is a {type(rewritten).__name__}, and has no graph whose nodes could be compared"
    expected = _values(model, inputs)
    found, error = _values_of_nodes(rewritten, graph, inputs)
    equal = {
        node: _are_close(found[key], expected[key], tolerance)
        for node, key in _keys(graph).items()
        if key in expected and key in found and node.op != "output"
    }
    if error is not None:
        node, reason = error
        return f"the node {node.name} fails: {reason}\n{lines_of([node], graph)}"
    behind = _behind_equal(graph, equal)
    nodes = [node for node in graph.nodes if node in behind]
    guilty = next((node for node in nodes if equal.get(node) is False), None)
    if guilty is None:
        return f"no value differs that both have; these nodes are behind the last equal ones\n{lines_of(nodes, graph)}"
    shown = [node for node in nodes[: nodes.index(guilty) + 1] if node is guilty or _leads_to(node, guilty)]
    return f"the first value that differs is that of {guilty.name}, behind these nodes\n{lines_of(shown, graph)}"


def graph_of(module: nn.Module) -> fx.Graph | None:
    """Returns the graph that a module runs in its mode, if it is a graph module."""
    template = template_of(module)
    if template is not None:
        return template.graphs[template.index(module)]
    return module.graph if isinstance(module, fx.GraphModule) else None


def _keys(graph: fx.Graph) -> dict[fx.Node, Hashable]:
    """Returns the key of each node's value in another model: the node's name, or the path and index of a call."""
    calls: Counter[str] = Counter()
    keys: dict[fx.Node, Hashable] = {}
    for node in graph.nodes:
        keys[node] = node.name
        if node.op == "call_module":
            keys[node] = (node.target, calls[node.target])
            calls[node.target] += 1
    return keys


def _values(model: nn.Module, inputs: ExampleInputs) -> Values:
    graph = graph_of(model)
    return _values_of_modules(model, inputs) if graph is None else _values_of_nodes(model, graph, inputs)[0]


def _values_of_modules(model: nn.Module, inputs: ExampleInputs) -> Values:
    values: Values = {}
    calls: Counter[str] = Counter()

    def note(path: str, value: Any) -> None:
        values[path, calls[path]] = _copied(value)
        calls[path] += 1

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            handle = module.register_forward_hook(lambda _, __, value, path=path: note(path, value))
            hooks.callback(handle.remove)
        run(model, inputs)
    return values


def _values_of_nodes(
    module: nn.Module, graph: fx.Graph, inputs: ExampleInputs
) -> tuple[Values, tuple[fx.Node, str] | None]:
    """Returns the values of all nodes up to a failure, and the failing node with the reason, if any."""
    values: Values = {}
    keys = _keys(graph)
    at: list[fx.Node] = []

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            at.append(n)
            value = super().run_node(n)
            values[keys[n]] = _copied(value)
            return value

    seed_generators()
    try:
        # without `graph`, Interpreter reads module.graph, which copies a shared graph
        Noting(module, garbage_collect_values=False, graph=graph).run(*_in_order(graph, inputs))
    except Exception as error:
        return values, (at[-1], f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") if at else None
    return values, None


def _in_order(graph: fx.Graph, inputs: ExampleInputs) -> Iterator[Any]:
    """Yields the arguments of a call in the order of a graph's placeholders."""
    args, kwargs = split_inputs(inputs)
    positional, named = iter(args or ()), dict(kwargs)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.target.startswith("**"):
            yield named
        elif node.target.startswith("*"):
            yield from positional
        elif node.target in named:
            yield named.pop(node.target)
        else:
            yield next(positional, *node.args)


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, opened(value))


def _are_close(found: Any, expected: Any, tolerance: float) -> bool:
    left, tree = pytree.tree_flatten(found)
    right, other_tree = pytree.tree_flatten(expected)
    return tree == other_tree and all(difference(a, b, tolerance) is None for a, b in zip(left, right, strict=True))


def _behind_equal(graph: fx.Graph, equal: Mapping[fx.Node, bool]) -> set[fx.Node]:
    """Returns the nodes on paths to the output on which no value is equal."""
    [output] = [node for node in graph.nodes if node.op == "output"]
    behind: set[fx.Node] = set()
    waiting = [output]
    while waiting:
        node = waiting.pop()
        for source in node.all_input_nodes:
            if source not in behind and not equal.get(source, False):
                behind.add(source)
                waiting.append(source)
    return behind


def _leads_to(node: fx.Node, other: fx.Node) -> bool:
    waiting, seen = [other], set()
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is node:
                return True
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return False
