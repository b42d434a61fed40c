"""Lets a module's forward come from a graph, in place: the module becomes an ``fx.GraphModule`` of its own class.

A `Template` is a graph with its compiled forward. Modules whose graphs are equal share one template and so one class;
a module gets a graph of its own only when somebody asks for `GraphModule.graph`, to look at it or to edit it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import nn
from torch._ops import OpOverload
from torch.fx.graph_module import _forward_from_src
from torch.fx.node import map_arg

from graphpeft import in_place

VALUE = "val"
"""The key of ``node.meta`` under which PyTorch's passes, and this tracer, keep a node's example value."""


class Template:
    """A graph, its generated code and its compiled forward.

    Args:
        graph: The graph. A shared template's graph must not be edited: see `derive`.
        shared: Whether many modules may wear the template.
    """

    def __init__(self, graph: fx.Graph, shared: bool) -> None:
        code = graph.python_code(root_module="self")
        self.graph = graph
        self.shared = shared
        self.facts: dict[Hashable, Any] = {}
        self._derived: dict[Hashable, Template] = {}
        # GraphModule's own methods read these three attributes
        namespace = {
            "_graph": graph,
            "_code": code.src,
            "_lineno_map": code._lineno_map,
            "_graphpeft_template": self,
            "forward": _forward_from_src(code.src, code.globals),
        }
        recipe = (_layer_of, (self,))
        self.layer = in_place.Layer("graph", (GraphForward,), namespace, recipe, lambda: self.for_copy().layer)

    def for_copy(self) -> Template:
        """Returns the template for a copy of a module that wears this one."""
        return self if self.shared else Template(copy_graph(self.graph), shared=False)

    def derive(self, key: Hashable, edit: Callable[[fx.Graph], None]) -> Template:
        """Returns the template of this graph after `edit`, from the cache when `key` was asked for before.

        Args:
            key: What tells the edit from every other edit of this graph.
            edit: Edits a copy of the graph in place.
        """
        derived = self._derived.get(key)
        if derived is None:
            graph = copy_graph(self.graph)
            edit(graph)
            graph.lint()
            derived = self._derived[key] = Template(graph, self.shared)
        return derived

    def remember(self, key: Hashable, template: Template) -> None:
        """Notes that the edit `key` of this graph gives `template`, such as the way back from a derived one."""
        self._derived.setdefault(key, template)

    def __deepcopy__(self, memo: dict[int, Any]) -> Template:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        graph = copy_graph(self.graph, _as_named)
        for node in graph.nodes:
            # example values are fake tensors, which can't be pickled
            node.meta.pop(VALUE, None)
        return _unpickled, (graph, self.shared)


class _NamedOperator:
    """Stands in a pickle for an operator of ``torch.ops``, which can't be pickled."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name

    def __call__(self) -> Any:
        raise TypeError(f"{self.name} is a name in a pickle")


def _as_named(target: Any) -> Any:
    return _NamedOperator(str(target)) if isinstance(target, OpOverload) else target


def _by_name(target: Any) -> Any:
    if isinstance(target, _NamedOperator):
        return functools.reduce(getattr, target.name.split("."), torch.ops)
    return target


def _unpickled(graph: fx.Graph, shared: bool) -> Template:
    return Template(copy_graph(graph, _by_name), shared)


def _layer_of(template: Template) -> in_place.Layer:
    return template.layer


class GraphForward(fx.GraphModule):
    """The interface of ``fx.GraphModule`` on a module that was not built as one."""

    _graphpeft_template: ClassVar[Template]

    @property
    def graph(self) -> fx.Graph:
        """The module's own graph. Call `recompile` after editing it."""
        if self._graphpeft_template.shared:
            wear_template(self, Template(copy_graph(self._graphpeft_template.graph), shared=False))
        return self._graphpeft_template.graph

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        wear_template(self, Template(g, shared=False))

    def recompile(self) -> Any:
        """Compiles the forward from the graph again, after an edit."""
        wear_template(self, Template(self.graph, shared=False))


def wear_template(module: nn.Module, template: Template) -> None:
    """Makes `module`'s forward the one of `template`."""
    in_place.put_on(module, template.layer)


def template_of(module: nn.Module) -> Template | None:
    """Returns the template that `module` wears, or None for a module that runs its own code."""
    return getattr(type(module), "_graphpeft_template", None)


def copy_graph(graph: fx.Graph, target: Callable[[Any], Any] = lambda target: target) -> fx.Graph:
    """Copies a graph with its code generator and its nodes' metadata (not deep).

    Args:
        graph: The graph.
        target: What the copy calls in place of what a node of the graph calls.
    """
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), nodes.__getitem__)  # type: ignore[misc]
        nodes[node] = copied.create_node(node.op, target(node.target), args, kwargs, node.name, node.type)
        nodes[node].meta = copy.copy(node.meta)
    copied._codegen = copy.deepcopy(graph._codegen)
    return copied
