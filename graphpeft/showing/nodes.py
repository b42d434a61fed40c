"""The nodes of a graph as a picture has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from graphpeft.graph.calls import calls_of
from graphpeft.graph.dependencies import line_of
from graphpeft.graph.settings import CHECKS
from graphpeft.graph.slots import without_slot
from graphpeft.graph.tags import REWRITE, TAG, Tag
from graphpeft.graph.template import VALUE
from graphpeft.showing.picture import DrawnGraph, DrawnNode
from graphpeft.wording import shortened

MODES = ("evaluation", "training")


def drawn_graphs(before: tuple[fx.Graph, ...], after: tuple[fx.Graph, ...], module: nn.Module) -> list[DrawnGraph]:
    """Returns the drawn graphs of a forward."""
    modes = ("",) if len(after) == 1 else MODES
    before = before * len(after) if len(before) == 1 else before
    return [
        DrawnGraph(mode, drawn_nodes(without, module), drawn_nodes(with_adapters, module))
        for mode, without, with_adapters in zip(modes, before, after, strict=True)
    ]


def drawn_nodes(graph: fx.Graph, module: nn.Module) -> list[DrawnNode]:
    """Returns the nodes of a graph in their order, without those that only check."""
    checks = {node for node in graph.nodes if node.target in CHECKS and not node.users}
    asked = _only_asked(graph, checks)
    left_out = checks | asked
    checked: dict[fx.Node, list[str]] = {}
    for check in (node for node in graph.nodes if node in checks):
        for source in _sources(check, asked):
            checked.setdefault(source, []).append(str(check.args[-1]))
    return [_drawn(node, module, checked.get(node, [])) for node in graph.nodes if node not in left_out]


def told_of(module: nn.Module, graphs: Iterable[fx.Graph]) -> tuple[str, ...]:
    """Returns what nodes tell of a module itself: the classes of what they call, and the shapes of what they read."""
    nodes = [node for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")]
    return tuple(label_of(node, module) if node.op == "call_module" else _value(node, module) for node in nodes)


def _sources(check: fx.Node, asked: set[fx.Node]) -> list[fx.Node]:
    """Returns the nodes of whose values a check asks."""
    found: list[fx.Node] = []
    waiting = list(check.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in asked:
            waiting += node.all_input_nodes
        else:
            found.append(node)
    return list(dict.fromkeys(found))


def _only_asked(graph: fx.Graph, checks: set[fx.Node]) -> set[fx.Node]:
    """Returns the nodes whose values only checks read, such as the size of a tensor."""
    asked: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if (
            node.users
            and node.op in ("call_function", "call_method")
            and all(u in checks or u in asked for u in node.users)
        ):
            asked.add(node)
    return asked


def _drawn(node: fx.Node, module: nn.Module, checks: list[str]) -> DrawnNode:
    tag: Tag | None = node.meta.get(TAG)
    return DrawnNode(
        name=node.name,
        op=node.op,
        label=label_of(node, module),
        arguments=_arguments(node),
        inputs=[source.name for source in node.all_input_nodes],
        value=_value(node, module),
        line=line_of(node),
        calls=[call.name for call in calls_of(node)],
        module=str(node.target) if node.op in ("call_module", "get_attr") else "",
        checks=checks,
        slot=None if tag is None else tag.slot,
        site="" if tag is None else tag.site,
        rule="" if tag is None or tag.rule is None else type(tag.rule).__name__,
        over="" if tag is None else tag.stands_for or "",
        rewrite=node.meta.get(REWRITE, ""),
    )


def label_of(node: fx.Node, module: nn.Module) -> str:
    """Returns a short text for a node: the function, the class of the called module, the name of what is read."""
    target: Any = node.target
    if node.op == "call_module":
        return type(module.get_submodule(target)).__name__
    if node.op == "call_method":
        return f".{target}"
    if node.op == "call_function":
        return getattr(target, "__name__", str(target))
    if node.op == "get_attr":
        # what an adapter has is at the path of its slot
        return without_slot(target) if TAG in node.meta else target
    return str(target)


def _arguments(node: fx.Node) -> str:
    given = [_shown(value) for value in node.args]
    given += [f"{name}={_shown(value)}" for name, value in node.kwargs.items()]
    return shortened(", ".join(given), 400)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else repr(map_arg(value, str)).replace("'", "")


def _value(node: fx.Node, module: nn.Module) -> str:
    value = node.meta.get(VALUE)
    if node.op == "get_attr" and not isinstance(value, torch.Tensor):
        value = _read(module, str(node.target))
    return shape_of(value)


def _read(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def shape_of(value: Any) -> str:
    """Returns the shape and the dtype of a tensor as text; "" for anything else."""
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = " × ".join(map(str, value.shape)) or "scalar"
    return f"{sizes}, {str(value.dtype).removeprefix('torch.')}"
