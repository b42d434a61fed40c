"""Gives a module a graph as its forward, in place: the module becomes an ``fx.GraphModule`` of its own class.

A `Template` is a graph with its compiled forward, or two graphs where training differs from evaluation. Modules with
equal graphs share one template and so one class. A module gets graphs of its own only when `GraphModule.graph` is read,
to inspect or edit it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import compiler_asks, lines_of_nodes
from graphpeft.graph import guards, in_place, slots
from graphpeft.graph.compiling import compiled
from graphpeft.graph.contexts import closing_regions
from graphpeft.graph.copied_graphs import as_named, by_name, copy_graph
from graphpeft.graph.hosts.around_patched import own_forward
from graphpeft.graph.hosts.peft import NoWrapper
from graphpeft.graph.own_tensors import as_own
from graphpeft.graph.paths import modules_by_path
from graphpeft.graph.tags import TAG

VALUE = "val"
"""The key of ``node.meta`` under which PyTorch's passes, and this tracer, keep a node's example value."""

LINE = "graphpeft_line"
"""The key of ``node.meta`` for the line of the model's code that made a node: its file and its number."""

SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
"""Types whose values can stand in generated code."""

FIXED = "graphpeft_fixed"
"""The key of ``node.meta`` for the layer options, by name, on which a hand-written graph depends."""

ABSENT = "graphpeft_absent"
"""The key of ``node.meta`` for the parameters that a layer can have, and a hand-written graph doesn't read."""

OWN_FORWARD = "_graphpeft_own_forward"
"""The module attribute by which a graph calls the forward of the module's own class."""

SET_FORWARD = "_graphpeft_run_set_forward"
"""The module attribute by which a graph calls the module's patched forward, as one operation among others."""

_MOST_NODES = 20_000
"""The most nodes, in all graphs together, of the recently used templates that are kept."""

_MOST_NAMES = 64
"""The number of adapter sets for which a template caches its layers."""

Graphs = tuple[fx.Graph, ...]
"""The graph of a forward, or its graphs for evaluation and for training, where these differ."""


class Before(NamedTuple):
    """The graphs that a module ran before they were rewritten.

    Attributes:
        template: The template of these graphs.
        is_worn: Whether the module wore it; otherwise it ran its class's forward, of which that is a recording.
    """

    template: Template
    is_worn: bool


class Template:
    """The graphs of a forward with their compiled code.

    Attributes:
        slots: The slots of the adapters that have nodes in the graphs.
        fixed: The values of attributes that can't change while a module wears the template, by name.
        absent: The names of parameters that a module can't get while it wears the template.
    """

    def __init__(
        self, graphs: Graphs, shared: bool, plain: Template | None = None, before: Before | None = None
    ) -> None:
        self.graphs = graphs
        self.before = before
        self.codes = [graph.python_code(root_module="self") for graph in graphs]
        for graph, code in zip(graphs, self.codes, strict=True):
            code.src = as_own(graph, code.src, code.globals)
        self.shared = shared
        self.plain = self if plain is None else plain
        self.facts, self.meta = dict[Hashable, Any](), dict[str, Any]()
        self.slots = frozenset(node.meta[TAG].slot for graph in graphs for node in graph.nodes if TAG in node.meta)
        self.fixed = dict[str, Any]()
        for graph in graphs:
            for node in graph.nodes:
                self.fixed |= node.meta.get(FIXED, {})
        self.absent = frozenset[str]().union(*(n.meta.get(ABSENT, ()) for graph in graphs for n in graph.nodes))
        self._back: tuple[Hashable, Template] | None = None
        self._derived: weakref.WeakValueDictionary[Hashable, Template] = weakref.WeakValueDictionary()
        self._forwards = [
            compiled(self, graph, code.src, code.globals) for graph, code in zip(graphs, self.codes, strict=True)
        ]
        self._layer_for = functools.lru_cache(maxsize=_MOST_NAMES)(self._layer_with)
        self._forward_for = functools.lru_cache(maxsize=_MOST_NAMES)(self._forward_with)

    def layer_for(self, names: Mapping[int, str]) -> in_place.Layer:
        """Returns the layer for a module, given the adapters in the slots; slots without nodes here don't matter."""
        return self._layer_for(self._own(names))

    def _own(self, names: Mapping[int, str]) -> slots.Names:
        return tuple((slot, names[slot]) for slot in sorted(self.slots) if slot in names)

    def _layer_with(self, names: slots.Names) -> in_place.Layer:
        forward = self._forward_for(())
        # a layer further out may have a forward of its own, which reads _graphpeft_forward
        namespace = {
            **{name: guards.fixed(name, value) for name, value in self.fixed.items()},
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
        """Returns the forward for a module without slots, as a function of it, given the adapters in the slots."""
        return self._forward_for(self._own(names))

    def _forward_with(self, names: slots.Names) -> Callable[..., Any]:
        forwards = [
            closing_regions(graph, slots.named(forward, names))
            for graph, forward in zip(self.graphs, self._forwards, strict=True)
        ]
        return forwards[0] if len(forwards) == 1 else _by_mode(*forwards)

    def needs(self, name: str) -> bool:
        """Returns whether an adapter's nodes read an attribute of the module."""
        nodes = [node for graph in self.graphs for node in graph.nodes if node.op == "get_attr" and node.target == name]
        return any(TAG in user.meta for node in nodes for user in node.users)

    @functools.cached_property
    def calls_own_forward(self) -> bool:
        """Whether the graphs only wrap the forward of the module's own class, which runs unchanged."""
        return any(node.target == OWN_FORWARD for graph in self.graphs for node in graph.nodes)

    @functools.cached_property
    def calls_set_forward(self) -> bool:
        """Whether the graph has a layer's patched forward as its operation."""
        return any(node.target == SET_FORWARD for graph in self.graphs for node in graph.nodes)

    def index(self, module: nn.Module) -> int:
        """Returns the index of the graph that `module` runs in its mode."""
        return int(module.training and len(self.graphs) > 1)

    def copied_graphs(self) -> Graphs:
        """Returns copies of the graphs."""
        return tuple(copy_graph(graph) for graph in self.graphs)

    def for_copy(self) -> Template:
        """Returns the template for a copy of a module that wears this template."""
        if self.shared:
            return self
        plain = None if self.plain is self else self.plain.for_copy()
        return Template(self.copied_graphs(), False, plain, self.before)

    def for_edit(self) -> Template:
        """Returns a copy of the template, for a module that needs graphs of its own."""
        return Template(self.copied_graphs(), False, None if self.plain is self else self.plain, self.before)

    def derive(self, key: Hashable, edit: Callable[[Graphs], None], back: Hashable | None = None) -> Template:
        """Returns the template of these graphs after `edit`, cached under `key`."""
        if self._back is not None and self._back[0] == key:
            return self._back[1]
        derived = self._derived.get(key)
        if derived is None:
            derived = self._derived[key] = Template(self._edited(edit), self.shared, before=self.before)
            derived._back = None if back is None else (back, self)
        _LAST_USED.keep(derived)
        return derived

    def optimized(self, key: Hashable, edit: Callable[[Graphs], None], meta: Mapping[str, Any]) -> Template:
        """Returns the template of these graphs after an `edit` that changes how they compute, not what they compute.

        This template becomes the result's `plain` one, to which all other edits apply.
        """
        known = self._derived.get(key)
        if known is None:
            known = self._derived[key] = Template(self._edited(edit), self.shared, self, self.before)
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
        graphs = tuple(copy_graph(graph, as_named) for graph in self.graphs)
        for graph in graphs:
            for node in graph.nodes:
                # example values are fake tensors, which can't be pickled; files have other paths elsewhere
                node.meta.pop(VALUE, None)
                node.meta.pop(LINE, None)
        # PyTorch 2.10 pickles a node's target in place of its type
        types = [[node.type for node in graph.nodes] for graph in graphs]
        return _unpickled, (graphs, types, self.shared, None if self.plain is self else self.plain, self.before)


class _LastUsed:
    """Keeps the most recently used derived templates alive, for the next change of adapters.

    Modules keep the templates that they wear, and these keep the templates from which they were derived.
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


def _unpickled(
    graphs: Graphs, types: list[list[Any]], shared: bool, plain: Template | None, before: Before | None
) -> Template:
    for graph, of_nodes in zip(graphs, types, strict=True):
        for node, of_node in zip(graph.nodes, of_nodes, strict=True):
            node.type = of_node
    return Template(tuple(copy_graph(graph, by_name) for graph in graphs), shared, plain, before)


def _layer_of(template: Template, names: slots.Names) -> in_place.Layer:
    return template.layer_for(dict(names))


class _Meta:
    """The ``meta`` dict that fx passes use on a graph module; a module's own attribute of that name wins."""

    def __get__(self, module: GraphForward | None, cls: type[GraphForward]) -> dict[str, Any]:
        return cls._graphpeft_template.meta


class GraphForward(NoWrapper, fx.GraphModule):
    """The interface of ``fx.GraphModule`` on a module that was not built as one."""

    _graphpeft_template: ClassVar[Template]
    _graphpeft_slots: ClassVar[Mapping[int, str]]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter, or raises GuardError if the graph can't read it, or an adapter can't do without it."""
        if param is not None and name in self._graphpeft_template.absent:
            guards.refuse_other(self, name, "None", "a parameter")
        if param is None and self._parameters.get(name) is not None and self._graphpeft_template.needs(name):
            guards.refuse_other(self, name, "a parameter", "None")
        super().register_parameter(name, param)

    # GraphModule's own methods, and torch.compile, read these attributes

    @property
    def _graph(self) -> fx.Graph:
        return self._graphpeft_template.graphs[self._graphpeft_template.index(self)]

    @property
    def _code(self) -> str:
        # tells readers of the code which adapter is in which slot
        whose = [f"# slot{slot} is that of the adapter {name!r}\n" for slot, name in self._graphpeft_slots.items()]
        return "".join(whose) + self._graphpeft_template.codes[self._graphpeft_template.index(self)].src

    meta = cast(Any, _Meta())

    @property
    def _lineno_map(self) -> Any:
        return lines_of_nodes(self._graphpeft_template.codes[self._graphpeft_template.index(self)])

    @property
    def _graphpeft_own_forward(self) -> Callable[..., Any]:
        return own_forward(self)

    @property
    def _graphpeft_run_set_forward(self) -> Callable[..., Any]:
        return own_forward(self)

    @property
    def graphs(self) -> Graphs:
        """The module's own graph, or its graphs for evaluation and for training. Call `recompile` after editing them.

        The graphs of an optimized model can be read, not edited.
        """
        if self._graphpeft_template.shared:
            if compiler_asks():
                # a compiler only looks for its own metadata there, and edits nothing
                return self._graphpeft_template.graphs
            wear_template(self, self._graphpeft_template.for_edit())
        for graph in self._graphpeft_template.graphs:
            # fx passes such as dead code elimination look up called modules there; weak, since the module's class keeps
            # the graph, which must not keep the module
            graph.owning_module = cast(Any, weakref.proxy(self))
        return self._graphpeft_template.graphs

    @property
    def graph(self) -> fx.Graph:
        """The graph that the module runs in its present mode.

        An assigned graph runs in both modes.
        """
        return self.graphs[self._graphpeft_template.index(self)]

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        self._refuse_edits_of_optimized()
        wear_template(self, Template((g,), False, before=self._graphpeft_template.before))

    def delete_all_unused_submodules(self) -> None:
        """Deletes the submodules that no graph of this module, for either mode, calls or reads."""
        nodes = [node for graph in self.graphs for node in graph.nodes if node.op in ("call_module", "get_attr")]
        called = {str(node.target) for node in nodes if node.op == "call_module"}
        used = [str(node.target).split(".") for node in nodes]
        kept = {".".join(parts[:depth]) for parts in used for depth in range(1, len(parts) + 1)}
        for path in [path for path in modules_by_path(self) if path and path not in kept]:
            if not any(path.startswith(f"{outer}.") for outer in called):
                self.delete_submodule(path)

    def recompile(self) -> Any:
        """Compiles the forward from the graphs again, after an edit."""
        self._refuse_edits_of_optimized()
        wear_template(self, Template(self.graphs, False, before=self._graphpeft_template.before))

    def _refuse_edits_of_optimized(self) -> None:
        if self._graphpeft_template.plain is not self._graphpeft_template:
            # adapters are added to and removed from the plain graphs, which would lack the edit
            raise RuntimeError(
                f"the graph of this {in_place.original_class(self).__name__} is an optimized one, and edits belong "
                "into the plain one: call graphpeft.optimize(model, []), edit the graph, and optimize the model again"
            )


def wear_template(module: nn.Module, template: Template, names: Mapping[int, str] | None = None) -> None:
    """Makes `module` run the forward of `template`."""
    refuse_other_options(module, template)
    in_place.put_on(module, template.layer_for(names_in_slots(module) if names is None else names))


def refuse_other_options(module: nn.Module, template: Template) -> None:
    """Raises GuardError if an attribute of `module` has another value than `template` fixes."""
    for name, fixed in template.fixed.items():
        if vars(module)[name] != fixed:
            guards.refuse_other(module, name, repr(fixed), repr(vars(module)[name]))
    for name in template.absent:
        if module._parameters.get(name) is not None:
            guards.refuse_other(module, name, "None", "a parameter")


def names_in_slots(module: nn.Module) -> Mapping[int, str]:
    """Returns the names of the adapters that have nodes in a module's graph, by slot.

    Args:
        module: A module of an adapted model; without a graph it has no such adapters.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), "mine")
        >>> dict(names_in_slots(model[0]))
        {0: 'mine'}
    """
    return getattr(type(module), "_graphpeft_slots", {})


def graph_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the forward of the template that `module` wears, as a function of the module, or None."""
    return getattr(type(module), "_graphpeft_forward", None)


def worn_template(module: nn.Module) -> Template | None:
    """Returns the template that `module` wears, or None for a module that runs its own code."""
    return getattr(type(module), "_graphpeft_template", None)


def template_of(module: nn.Module) -> Template | None:
    """Returns the template that `module` wears as it was before optimisation passes, or None."""
    worn = worn_template(module)
    return None if worn is None else worn.plain


def runs_graph(module: nn.Module) -> bool:
    """Returns whether a module runs a graph alone, not a graph around its own code."""
    if not isinstance(module, fx.GraphModule):
        return False
    template = template_of(module)
    return template is None or not template.calls_own_forward
