"""Lets a module's forward come from a graph, in place: the module becomes an ``fx.GraphModule`` of its own class.

A `Template` is a graph with its compiled forward, or two of them where the code goes another way in training than in
evaluation. Modules whose graphs are equal share one template and so one class; a module gets graphs of its own only
when somebody asks for `GraphModule.graph`, to look at it or to edit it.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NoReturn, cast

import torch
import torch.fx as fx
from torch import nn
from torch.fx.node import map_arg

from graphpeft._torch import OpOverload, compiler_asks, empty_graph_like, lines_of_nodes
from graphpeft.graph import in_place, slots
from graphpeft.graph.compiling import compiled
from graphpeft.graph.contexts import closing_regions
from graphpeft.graph.errors import GuardError
from graphpeft.graph.tags import TAG

VALUE = "val"
"""The key of ``node.meta`` under which PyTorch's passes, and this tracer, keep a node's example value."""


SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
"""Types of which a value can stand in generated code."""

FIXED = "graphpeft_fixed"
"""The key of ``node.meta`` under which a given graph has the options of a layer on which it depends, by name."""

OWN_FORWARD = "_graphpeft_own_forward"
"""The attribute of a module with a graph by which the graph can call the forward of the module's own class."""

_MOST_NODES = 20_000
"""How many nodes the graphs of templates have that are kept because they were used lately."""

_MOST_NAMES = 64
"""For how many sets of adapters a template keeps its layer."""

Graphs = tuple[fx.Graph, ...]
"""The graph of a forward, or that of evaluation and that of training, where they differ."""


class Template:
    """The graphs of a forward with their code, compiled.

    Args:
        graphs: One graph, or that of evaluation and that of training. Those of a shared template must not be edited:
            see `derive`.
        shared: Whether many modules may wear the template.
        plain: The template whose graphs these are after passes that change how they compute; the template itself if
            there were none.

    Attributes:
        slots: The slots of which adapters have nodes in the graphs.
        fixed: Attributes that a module can't set to other values while it wears the template, by name.
    """

    def __init__(self, graphs: Graphs, shared: bool, plain: Template | None = None) -> None:
        self.graphs = graphs
        self.codes = [graph.python_code(root_module="self") for graph in graphs]
        self.shared = shared
        self.plain = self if plain is None else plain
        self.facts: dict[Hashable, Any] = {}
        self.meta: dict[str, Any] = {}
        self.slots = frozenset(node.meta[TAG].slot for graph in graphs for node in graph.nodes if TAG in node.meta)
        self.fixed: dict[str, Any] = {}
        for graph in graphs:
            for node in graph.nodes:
                self.fixed |= node.meta.get(FIXED, {})
        self._back: tuple[Hashable, Template] | None = None
        self._derived: weakref.WeakValueDictionary[Hashable, Template] = weakref.WeakValueDictionary()
        self._forwards = [compiled(self, code.src, code.globals) for code in self.codes]
        self._layer_for = functools.lru_cache(maxsize=_MOST_NAMES)(self._layer_with)

    def layer_for(self, names: Mapping[int, str]) -> in_place.Layer:
        """Returns what a module wears, given the adapters in the slots; slots without nodes here don't matter."""
        return self._layer_for(tuple((slot, names[slot]) for slot in sorted(self.slots) if slot in names))

    def _layer_with(self, names: slots.Names) -> in_place.Layer:
        forward = self._forward_with(names)
        # a layer further out may have a forward of its own, which asks for this one
        namespace = {
            **{name: _fixed(name, value) for name, value in self.fixed.items()},
            "_graphpeft_template": self,
            "_graphpeft_slots": dict(names),
            "_graphpeft_forward": forward,
            "forward": forward,
        }
        recipe = (_layer_of, (self, names))
        return in_place.Layer(
            "graph", (GraphForward,), namespace, recipe, lambda: self.for_copy().layer_for(dict(names))
        )

    def forward_for(self, names: Mapping[int, str]) -> Callable[..., Any]:
        """Returns the forward, a function of the module, given the adapters in the slots."""
        return self.layer_for(names).namespace["_graphpeft_forward"]

    def _forward_with(self, names: slots.Names) -> Callable[..., Any]:
        forwards = [
            closing_regions(graph, slots.named(forward, names))
            for graph, forward in zip(self.graphs, self._forwards, strict=True)
        ]
        return forwards[0] if len(forwards) == 1 else _by_mode(*forwards)

    @functools.cached_property
    def calls_own_forward(self) -> bool:
        """Whether the graphs only stand around the forward of the module's own class, which runs as it is."""
        return any(node.target == OWN_FORWARD for graph in self.graphs for node in graph.nodes)

    def index(self, module: nn.Module) -> int:
        """Returns which of the graphs `module` runs in its mode."""
        return int(module.training and len(self.graphs) > 1)

    def copied_graphs(self) -> Graphs:
        """Returns copies of the graphs."""
        return tuple(copy_graph(graph) for graph in self.graphs)

    def for_copy(self) -> Template:
        """Returns the template for a copy of a module that wears this one."""
        if self.shared:
            return self
        return Template(self.copied_graphs(), False, None if self.plain is self else self.plain.for_copy())

    def for_edit(self) -> Template:
        """Returns the template for a module that is to have graphs of its own."""
        return Template(self.copied_graphs(), False, None if self.plain is self else self.plain)

    def derive(self, key: Hashable, edit: Callable[[Graphs], None], back: Hashable | None = None) -> Template:
        """Returns the template of these graphs after `edit`, from the cache if it is there from a time before.

        Args:
            key: What tells the edit from every other edit of these graphs.
            edit: Edits copies of the graphs in place.
            back: The key of the edit that takes this one back.
        """
        if self._back is not None and self._back[0] == key:
            return self._back[1]
        derived = self._derived.get(key)
        if derived is None:
            derived = self._derived[key] = Template(self._edited(edit), self.shared)
            derived._back = None if back is None else (back, self)
        _LAST_USED.keep(derived)
        return derived

    def optimized(self, key: Hashable, edit: Callable[[Graphs], None], meta: Mapping[str, Any]) -> Template:
        """Returns the template of these graphs after an `edit` that changes how they compute, and not what.

        The result knows this template as its plain one, to which all other edits go.

        Args:
            key: As for `derive`.
            edit: Likewise.
            meta: What the result has as its `meta`, of which the edit may have filled in the content.
        """
        known = self._derived.get(key)
        if known is None:
            known = self._derived[key] = Template(self._edited(edit), self.shared, plain=self)
            known.meta.update(meta)
        _LAST_USED.keep(known)
        return known

    def _edited(self, edit: Callable[[Graphs], None]) -> Graphs:
        graphs = self.copied_graphs()
        edit(graphs)
        for graph in graphs:
            graph.lint()
        return graphs

    def __deepcopy__(self, memo: dict[int, Any]) -> Template:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        graphs = tuple(copy_graph(graph, _as_named) for graph in self.graphs)
        for graph in graphs:
            for node in graph.nodes:
                # example values are fake tensors, which can't be pickled
                node.meta.pop(VALUE, None)
        # PyTorch 2.10 pickles what a node calls for its type
        types = [[node.type for node in graph.nodes] for graph in graphs]
        return _unpickled, (graphs, types, self.shared, None if self.plain is self else self.plain)


class _LastUsed:
    """Keeps the derived templates that were used last, for the next change of adapters.

    What modules wear lives by itself, and with it all from which it was derived.
    """

    def __init__(self) -> None:
        self._sizes: dict[Template, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def keep(self, template: Template) -> None:
        with self._lock:
            size = self._sizes.pop(template, None)
            if size is None:
                size = sum(len(graph.nodes) for graph in template.graphs)
                self._total += size
            self._sizes[template] = size
            while self._total > _MOST_NODES and len(self._sizes) > 1:
                self._total -= self._sizes.pop(next(iter(self._sizes)))


_LAST_USED = _LastUsed()


def _by_mode(evaluation: Callable[..., Any], training: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(evaluation)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (training if self.training else evaluation)(self, *args, **kwargs)

    return forward


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


def _unpickled(graphs: Graphs, types: list[list[Any]], shared: bool, plain: Template | None) -> Template:
    for graph, of_nodes in zip(graphs, types, strict=True):
        for node, of_node in zip(graph.nodes, of_nodes, strict=True):
            node.type = of_node
    return Template(tuple(copy_graph(graph, _by_name) for graph in graphs), shared, plain)


def _fixed(name: str, fixed: Any) -> property:
    """Returns an attribute that stays what it is."""

    def read(module: nn.Module) -> Any:
        return vars(module)[name]

    def write(module: nn.Module, value: Any) -> None:
        if value != fixed:
            _refuse_other(module, name, fixed, value)
        vars(module)[name] = value

    return property(read, write)


def _refuse_other(module: nn.Module, name: str, fixed: Any, value: Any) -> NoReturn:
    raise GuardError(
        f"{name} of a {in_place.original_class(module).__name__} was {fixed!r} when it was adapted, and is to be "
        f"{value!r} now, which its graph doesn't know; set it before you adapt the model"
    )


def _layer_of(template: Template, names: slots.Names) -> in_place.Layer:
    return template.layer_for(dict(names))


class _Meta:
    """Gives the ``meta`` that passes of fx keep on a graph module; a module's own attribute of that name wins."""

    def __get__(self, module: GraphForward | None, cls: type[GraphForward]) -> dict[str, Any]:
        return cls._graphpeft_template.meta


class GraphForward(fx.GraphModule):
    """The interface of ``fx.GraphModule`` on a module that was not built as one."""

    _graphpeft_template: ClassVar[Template]
    _graphpeft_slots: ClassVar[Mapping[int, str]]

    # GraphModule's own methods, and torch.compile, read these attributes

    @property
    def _graph(self) -> fx.Graph:
        return self._graphpeft_template.graphs[self._graphpeft_template.index(self)]

    @property
    def _code(self) -> str:
        # a person who reads it wants to know whose the nodes are
        whose = [f"# slot{slot} is that of the adapter {name!r}\n" for slot, name in self._graphpeft_slots.items()]
        return "".join(whose) + self._graphpeft_template.codes[self._graphpeft_template.index(self)].src

    meta = cast(Any, _Meta())

    @property
    def _lineno_map(self) -> Any:
        return lines_of_nodes(self._graphpeft_template.codes[self._graphpeft_template.index(self)])

    @property
    def _graphpeft_own_forward(self) -> Callable[..., Any]:
        return functools.partial(in_place.original_class(self).forward, self)

    @property
    def graphs(self) -> Graphs:
        """The module's own graph, or its graphs of evaluation and of training. Call `recompile` after editing them.

        Those of an optimized model can be read, not edited.
        """
        if self._graphpeft_template.shared:
            if compiler_asks():
                # a compiler looks there for notes of its own, and edits nothing
                return self._graphpeft_template.graphs
            wear_template(self, self._graphpeft_template.for_edit())
        for graph in self._graphpeft_template.graphs:
            # passes of fx, such as the elimination of dead code, look there at the modules that the graph calls; it is
            # weak, or a graph, which its module's class keeps, would keep the module
            graph.owning_module = cast(Any, weakref.proxy(self))
        return self._graphpeft_template.graphs

    @property
    def graph(self) -> fx.Graph:
        """That of the module's `graphs` which it runs in its present mode.

        A graph that is assigned is run in both modes.
        """
        return self.graphs[self._graphpeft_template.index(self)]

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        self._refuse_edits_of_optimized()
        wear_template(self, Template((g,), shared=False))

    def delete_all_unused_submodules(self) -> None:
        """Deletes the modules that no graph of this one calls or reads, whichever mode it is for."""
        nodes = [node for graph in self.graphs for node in graph.nodes if node.op in ("call_module", "get_attr")]
        called = {str(node.target) for node in nodes if node.op == "call_module"}
        used = [str(node.target).split(".") for node in nodes]
        kept = {".".join(parts[:depth]) for parts in used for depth in range(1, len(parts) + 1)}
        for path in [path for path, _ in self.named_modules() if path and path not in kept]:
            if not any(path.startswith(f"{outer}.") for outer in called):
                self.delete_submodule(path)

    def recompile(self) -> Any:
        """Compiles the forward from the graphs again, after an edit.

        Raises:
            RuntimeError: If the graphs are those of an optimized model.
        """
        self._refuse_edits_of_optimized()
        wear_template(self, Template(self.graphs, shared=False))

    def _refuse_edits_of_optimized(self) -> None:
        if self._graphpeft_template.plain is not self._graphpeft_template:
            # adapters come and go in the plain graphs, which would know nothing of the edit
            raise RuntimeError(
                f"the graph of this {in_place.original_class(self).__name__} is an optimized one, and edits belong "
                "into the plain one: call graphpeft.optimize(model, []), edit the graph, and optimize the model again"
            )


def wear_template(module: nn.Module, template: Template, names: Mapping[int, str] | None = None) -> None:
    """Makes `module`'s forward the one of `template`.

    Args:
        module: The module.
        template: The template.
        names: The adapters in the slots; None for those that the module has already.

    Raises:
        GuardError: If an attribute has another value than the one that is fixed by the template.
    """
    refuse_other_options(module, template)
    in_place.put_on(module, template.layer_for(names_in_slots(module) if names is None else names))


def refuse_other_options(module: nn.Module, template: Template) -> None:
    """Raises GuardError if an attribute of a module has another value than the one that is fixed by a template."""
    for name, fixed in template.fixed.items():
        if vars(module)[name] != fixed:
            _refuse_other(module, name, fixed, vars(module)[name])


def names_in_slots(module: nn.Module) -> Mapping[int, str]:
    """Returns the names of the adapters that have nodes in a module's graph, by their slots.

    Args:
        module: A module of an adapted model; one without a graph has none.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), "mine")
        >>> dict(names_in_slots(model[0]))
        {0: 'mine'}
    """
    return getattr(type(module), "_graphpeft_slots", {})


def graph_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the forward of the template that `module` wears, a function of it, or None."""
    return getattr(type(module), "_graphpeft_forward", None)


def worn_template(module: nn.Module) -> Template | None:
    """Returns the template that `module` wears, or None for a module that runs its own code."""
    return getattr(type(module), "_graphpeft_template", None)


def template_of(module: nn.Module) -> Template | None:
    """Returns the template that `module` wears, without what passes made of it, or None."""
    worn = worn_template(module)
    return None if worn is None else worn.plain


def copy_graph(graph: fx.Graph, target: Callable[[Any], Any] = lambda target: target) -> fx.Graph:
    """Copies a graph with its code generator and its nodes' metadata (not deep).

    Args:
        graph: The graph.
        target: What the copy calls in place of what a node of the graph calls.
    """
    copied = empty_graph_like(graph)
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), nodes.__getitem__)  # type: ignore[misc]
        nodes[node] = copied.create_node(node.op, target(node.target), args, kwargs, node.name, node.type)
        nodes[node].meta = copy.copy(node.meta)
    return copied


def runs_graph(module: nn.Module) -> bool:
    """Returns whether a graph is all that a module runs, and not only what stands around its own code."""
    if not isinstance(module, fx.GraphModule):
        return False
    template = template_of(module)
    return template is None or not template.calls_own_forward
