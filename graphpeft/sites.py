"""Finds where a weight is used: the operations of the smallest graph that holds them.

A site is one weight of the model with the operations that use it. Its region is the module whose own forward contains
them: for the weight of an ``nn.Linear`` the Linear itself, for a weight that is used functionally the module that runs
that line. A model that is a graph already is one region.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphpeft import dataflow, in_place, ops
from graphpeft.boundaries import NAME, Boundary, Leaf, boundaries_inside, boundary_of
from graphpeft.gradient_flow import flow_of
from graphpeft.ops import convolution, embedding
from graphpeft.parts import Runs, parts_found
from graphpeft.paths import join, within
from graphpeft.quantised import described, is_quantised
from graphpeft.tracing.errors import NeedsInputsError, TraceError
from graphpeft.tracing.graph_module import VALUE, Graphs, Template, template_of
from graphpeft.tracing.lift import lift, refuse_what_a_graph_cannot_replace
from graphpeft.tracing.own_forward import call_on_weights, call_through
from graphpeft.tracing.source import ANY, methods_reading, uses_in_forward
from graphpeft.tracing.trace import ExampleInputs, plain_attribute, split_inputs, stands_for


class OneCall(NamedTuple):
    """Which of the operations of a weight, or of the calls of a module, is meant, where each is a site of its own.

    Attributes:
        number: Its place in the order of the graph, from 1.
        of: How many there are.
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"call_{self.number}"


class Site(NamedTuple):
    """One weight and the operations that use it.

    Attributes:
        region: The path of the module whose graph holds the operations; "" is the model.
        nodes: The names of the operations' nodes, for each graph that the region has.
        op: The kind of operation, such as ``ops.Linear``; ``ops.Weight`` where no one kind describes its use.
        owner: The path of the module that owns the weight.
        attribute: The weight's name in its owner.
        shape: The weight's shape as it is stored.
        dtype: The weight's dtype.
        layout: The kind of operation for which it is stored: that of its layer, or `op`.
        transposed: Whether a layer stores it as (in, out), or whether the operation of a parameter reads it so.
        is_layer: Whether it is the weight of a layer that PEFT knows as a module, not only as a parameter.
        groups: Into how many groups a convolution's features are divided.
        shortens: Whether an embedding shortens the rows that it reads.
        parts: The rows of the parts of a fused projection that are adapted, if not all of it is.
        named: The module whose name stands for several weights, of which this is one; None for other weights.
        redrawn: Sites whose first values are drawn before those of this one, and once more in their own turn.
        bias: The path of the parameter that all operations add, or None if there is no such one.
        call: Which of the weight's operations it is, if not all of them.
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    op: type
    owner: str
    attribute: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: type
    transposed: bool
    is_layer: bool
    groups: int = 1
    shortens: bool = False
    parts: tuple[Runs, ...] = ()
    named: str | None = None
    redrawn: tuple[Site, ...] = ()
    bias: str | None = None
    call: OneCall | None = None

    way_out = "leave targets out with exclude_modules, or narrow target_modules"

    @property
    def unmergeable(self) -> str | None:
        """Why what an adapter does there can't be merged, or None."""
        if self.call is None:
            return None
        return f"it is one of {self.call.of} calls with a change of its own each, and the one weight can't have all"

    @property
    def in_features(self) -> int | None:
        """How many features the operation reads; None where the weight's shape doesn't tell."""
        return self.layout.features(self.shape, self.transposed, self.groups)[0]  # type: ignore[attr-defined]

    @property
    def out_features(self) -> int | None:
        """How many features the operation gives; None where the weight's shape doesn't tell."""
        return self.layout.features(self.shape, self.transposed, self.groups)[1]  # type: ignore[attr-defined]

    @property
    def beside(self) -> tuple[str, str]:
        """The tensor with whose device an adapter's tensors go: the path of its module, and its name."""
        return self.owner, self.attribute

    @property
    def reads(self) -> tuple[tuple[str, str], ...]:
        """Nothing: a rule reads the weight and the bias as they stand in the graph."""
        return ()

    @property
    def prefix(self) -> str:
        """What the names of an adapter's tensors begin with on the owner."""
        own = "" if self.attribute == "weight" else f"{self.attribute}_"
        return own if self.call is None else f"{own}{self.call}_"

    @property
    def weight(self) -> str:
        """The path of the weight."""
        return join(self.owner, self.attribute)

    @property
    def name(self) -> str:
        """What PEFT calls the site: the path of the layer, or of the parameter."""
        if self.named is not None:
            return self.named
        return self.owner if self.is_layer else self.weight

    @property
    def label(self) -> str:
        """Its own name: where `name` stands for several weights, the path of this one; and which call it is."""
        own = self.name if self.named is None else self.weight
        return own if self.call is None else join(own, str(self.call))

    @property
    def size(self) -> str:
        """Its features, for a person to read."""
        return self.layout.size(self.shape, self.transposed)  # type: ignore[attr-defined]


class LeafSite(NamedTuple):
    """The call of a module whose inside is its own affair, such as a layer whose weight is quantised.

    Attributes:
        region: The path of the module whose graph has the call: the module itself, or a flat graph around it.
        nodes: The names of the calls, for each graph that the region has.
        owner: The path of the module, where an adapter's tensors live.
        in_features: The size of the last dimension of the module's first argument.
        out_features: The size of the last dimension of what it returns.
        beside: The tensor with whose device an adapter's tensors go: the path of its module, and its name.
        dtype: The dtype of its weight; of one that holds integers, the default. Without a weight, that of its
            parameters, of the model's, or the default.
        quantised: What its weight is, if that holds codes of numbers.
        call: Which of the module's calls it is, if not all of them.
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    owner: str
    in_features: int
    out_features: int
    beside: tuple[str, str]
    dtype: torch.dtype
    quantised: str | None = None
    call: OneCall | None = None

    op = Leaf
    attribute = ""
    reads = ()
    is_layer = True
    named = None
    redrawn = ()
    way_out = Site.way_out

    @property
    def kind(self) -> str:
        """What it is, for a person to read."""
        weight = f" whose weight is quantised ({self.quantised})" if self.quantised is not None else ""
        return f"the call of a module{weight}"

    @property
    def unmergeable(self) -> str:
        """Why what an adapter does there can't be merged."""
        if self.quantised is None:
            return f"it is {self.kind}, and changes no weight"
        return f"it is {self.kind}; merge the adapter on the model as it was before, and quantise that"

    @property
    def prefix(self) -> str:
        """What the names of an adapter's tensors begin with on the owner."""
        return "" if self.call is None else f"{self.call}_"

    @property
    def label(self) -> str:
        """Its own name: that of the module, and which call it is."""
        return self.name if self.call is None else join(self.name, str(self.call))

    @property
    def name(self) -> str:
        """The path of the module."""
        return self.owner

    @property
    def size(self) -> str:
        """Its features, for a person to read."""
        return f"{self.in_features} → {self.out_features}"


class CallSite(NamedTuple):
    """The boundary of one module's forward.

    Attributes:
        region: The path of the module whose graph has the boundary: the module itself, or a flat graph around it.
        nodes: The names of the boundaries, one for each call of the module, for each graph that the region has.
        owner: The path of the module, where an adapter's tensors live; "" is the model.
        role: What the module is for an adapter that has several such sites, such as "encoder".
        beside: The tensor with whose device an adapter's tensors go: the path of its module, and its name.
        dtype: The dtype of an adapter's tensors.
        arguments: The names of the forward's arguments.
        reads: What else a rule may read, by its name for it: paths, seen from the module.
        file_path: What the names of its tensors begin with in files.
        positions: How many positions of tokens the module has a table for; None without a table.
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    owner: str
    role: str
    beside: tuple[str, str]
    dtype: torch.dtype
    arguments: tuple[str, ...]
    reads: tuple[tuple[str, str], ...] = ()
    file_path: str = ""
    positions: int | None = None

    op = Boundary
    prefix = ""
    redrawn = ()
    way_out = "name another module in prompt_scope"
    unmergeable = "the adapter changes what modules are given, not weights"

    @property
    def name(self) -> str:
        """The path of the module, for a person to read."""
        return self.owner or "the model"

    label = name

    @property
    def size(self) -> str:
        """What the module is for the adapter, for a person to read."""
        return self.role


class Crossing(NamedTuple):
    """Where the boundary of one module's forward is.

    Attributes:
        region: The path of the module whose graph has it.
        nodes: The names of the boundaries, for each graph that the region has.
        arguments: The names of the forward's arguments.
        values: Examples of those of them that the graph has, by name, as far as it knows them.
        returned: An example of what the forward returns, if the graph knows one.
    """

    region: str
    nodes: tuple[tuple[str, ...], ...]
    arguments: tuple[str, ...]
    values: Mapping[str, Any]
    returned: Any


class NoSiteError(Exception):
    """Why a weight, or a module, is no site."""


class SiteFinder:
    """Finds sites in one model, recording each module's graph once; the model stays as it is.

    Args:
        model: The model.
        known: Graphs of regions that were recorded before, by path.
        example_inputs: Inputs of the model, for modules whose forward decides on theirs.

    Attributes:
        templates: The graphs of the regions that were looked into, by path.
    """

    def __init__(
        self, model: nn.Module, known: Mapping[str, Template], example_inputs: ExampleInputs | None = None
    ) -> None:
        self.modules = dict(model.named_modules())
        self.known = known
        self.example_inputs = example_inputs
        self.templates: dict[str, Template] = {}
        self._graphs = {path for path, module in self.modules.items() if _runs_graph(module)}
        self._errors: dict[str, TraceError] = {}
        self._hands_on: dict[tuple[type, str | None], bool] = {}
        self._readers = _readers(self.modules)
        self._may_read = _may_read(self.modules)

    def find(self, owner: str, attribute: str) -> Site:
        """Returns the site of a weight.

        Args:
            owner: The path of the module that owns the weight.
            attribute: The weight's name in it.

        Raises:
            NoSiteError: If there is none.
        """
        weight = self.modules[owner]._parameters[attribute]
        assert weight is not None
        if is_quantised(weight):
            raise NoSiteError(
                f"its {attribute} is quantised ({described(weight)}), and no change can be added to that; name the "
                "module that computes with it in target_modules"
            )
        readers = self._readers.get((owner, attribute)) or self._hidden_readers(owner, attribute)
        region = self._region(owner, attribute, readers)
        caller = self._caller_outside(region, owner) if region in readers else None
        if caller is not None:
            raise NoSiteError(
                f"its {attribute} is read by {region or 'the model'}, and its module is called by "
                f"{caller or 'the model'}"
            )
        uses = self._uses(region, owner, attribute)
        assert uses is not None
        return self._site(region, owner, attribute, weight, uses)

    def _region(self, owner: str, attribute: str, readers: list[str]) -> str:
        """Returns the path of the smallest module whose graph, which is in `templates`, uses a weight.

        Args:
            owner: The path of the module that owns the weight.
            attribute: The weight's name in it.
            readers: The paths of modules around the owner that read the weight without calling the owner.

        Raises:
            NoSiteError: If there is none.
        """
        if len(readers) > 1:
            outermost = min(readers, key=len)
            if all(not outermost or path == outermost or path.startswith(f"{outermost}.") for path in readers) and (
                self._runs_on_weight(outermost, owner, attribute)
            ):
                return outermost
            names = ", ".join(path or "the model" for path in readers)
            raise NoSiteError(f"its {attribute} is read by several modules: {names}")
        reasons = []
        for region in readers or self._regions(owner):
            if self._template(region) is None:
                reasons.append(f"{region or 'the model'} can't become a graph: {self._errors[region]}")
            elif self._uses(region, owner, attribute) is not None:
                return region
        likeliest = readers[0] if readers else owner
        if likeliest in self._errors and self._runs_on_weight(likeliest, owner, attribute):
            return likeliest
        raise NoSiteError("; ".join(reasons) or f"no operation that a rule adapts uses its {attribute}")

    def _runs_on_weight(self, region: str, owner: str, attribute: str) -> bool:
        """Tells whether a module's own forward can be called on what has become of a weight; that is its graph then.

        So all see the change that read the weight inside, and the module need not be traced.
        """
        module = self.modules[region]
        if not self._is_called(region):
            return False
        try:
            template = self.templates.get(region) or template_of(module)
            if template is None:
                refuse_what_a_graph_cannot_replace(module)
                template = call_on_weights(module)
        except TraceError:
            return False
        if not template.calls_own_forward or join(within(owner, region), attribute) not in _uses(template, module):
            return False
        self.templates[region] = template
        return True

    def _uses(self, region: str, owner: str, attribute: str) -> _WeightUses | None:
        """Returns what the graph of a region does with a weight, or None if it doesn't use it."""
        return _uses(self.templates[region], self.modules[region]).get(join(within(owner, region), attribute))

    def boundary(self, path: str) -> Crossing:
        """Returns where the boundary of the forward of the module at `path` is; the module need not be traced.

        Raises:
            TraceError: If there can't be such a graph, or the module is never called.
        """
        module = self.modules[path]
        if not self._is_called(path):
            return self._boundary_inside(path)
        if path not in self.templates:
            found = template_of(module) or self.known.get(path)
            if found is None:
                refuse_what_a_graph_cannot_replace(module)
                found = lift(module) if isinstance(module, fx.GraphModule) else call_through(module)
            self.templates[path] = found
        template = self.templates[path]
        return _crossing(path, template.graphs, ((NAME,),) * len(template.graphs))

    def _boundary_inside(self, path: str) -> Crossing:
        """Returns the boundaries of the calls of a module that were inlined into a flat graph."""
        graphs = [region for region in self._graphs if not region or path.startswith(f"{region}.")]
        around = max(graphs, key=len, default=None)
        template = self._template(around) if around is not None else None
        if around is None or template is None:
            raise TraceError(f"a {type(self.modules[path]).__name__} is never called")
        names = tuple(boundaries_inside(graph, within(path, around)) for graph in template.graphs)
        if not all(names):
            raise TraceError(f"a {stands_for(self.modules[path]).__name__} isn't called in the graph")
        return _crossing(around, template.graphs, names)

    def calls_of(self, site: Site | LeafSite) -> list[Site | LeafSite]:
        """Returns a site for each operation, or call, that `site` has; a single one stays as it is.

        Raises:
            TraceError: If the graph of the model doesn't tell them apart.
        """
        if site.region and _runs_graph(self.modules[""]):
            raise TraceError(f"{site.region} stays a call in the graph, which has no place for what differs inside")
        if site.region:
            raise TraceError("only a flat graph of the whole model tells the calls of a module apart")
        if site.op is ops.Weight:
            raise TraceError("its weight is used as such, and not in operations that could be told apart")
        counts = {len(nodes) for nodes in site.nodes}
        if len(counts) > 1:
            raise TraceError("in training it is called another number of times than in evaluation")
        (count,) = counts
        if count == 1:
            return [site]
        each = zip(*site.nodes, strict=True)
        return [
            site._replace(nodes=tuple((node,) for node in nodes), call=OneCall(number, count))
            for number, nodes in enumerate(each, start=1)
        ]

    def parts_of(self, site: Site) -> dict[str, Runs]:
        """Returns the rows of q, k and v in a fused projection, by name.

        Raises:
            TraceError: If the graph around it doesn't tell.
        """
        features = site.shape[1] if site.transposed else site.shape[0]
        if site.region != site.owner:
            graph = self.templates[site.region].graphs[0]
            output = next(node for node in graph.nodes if node.name == site.nodes[0][0])
            return parts_found(graph, output, features)
        path, inside = self._around(site.owner)
        if path is None:
            raise TraceError("no module is around it")
        inputs = self.inputs_of(path)
        graph = (template_of(self.modules[path]) or lift(self.modules[path], inputs)).graphs[0]
        output = next((node for node in graph.nodes if node.op == "call_module" and node.target == inside), None)
        if output is None:
            raise TraceError(f"{path or 'the model'} doesn't call it by itself")
        return parts_found(graph, output, features)

    def leaf(self, path: str) -> LeafSite:
        """Returns the site of the calls of the module at `path`.

        Its features are those that it declares as `in_features` and `out_features`. If it declares none and has no
        layers inside, which one could name instead, they are those of the example inputs.

        Raises:
            NoSiteError: If there is none.
        """
        module = self.modules[path]
        name = stands_for(module).__name__
        try:
            crossing = self.boundary(path)
        except TraceError as error:
            raise NoSiteError(f"the call of a {name} can't be adapted: {error}") from error
        if not crossing.arguments:
            raise NoSiteError(f"the forward of a {name} takes no arguments")
        features = _declared(module) if declares_features(module) else self._features(path, crossing)
        beside, dtype, quantised = self._leafs_tensor(path)
        return LeafSite(
            region=crossing.region,
            nodes=crossing.nodes,
            owner=path,
            in_features=features[0],
            out_features=features[1],
            beside=beside,
            dtype=dtype,
            quantised=quantised,
        )

    def _leafs_tensor(self, path: str) -> tuple[tuple[str, str], torch.dtype, str | None]:
        """Returns beside which tensor those of an adapter go, their dtype, and what a quantised weight is."""
        weight = self.modules[path]._parameters.get("weight")
        if weight is not None and is_quantised(weight):
            dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
            return (path, "weight"), dtype, described(weight)
        tensors = ((*names, tensor) for *names, tensor in self._tensors(path) if tensor.is_floating_point())
        owner, name, tensor = next(tensors, (path, "", torch.empty(0)))
        return (owner, name), tensor.dtype, None

    def trains(self, site: Site) -> bool:
        """Tells whether the forward of the layer whose weight is the site has a gradient for it, as far as is known."""
        module = self.modules[site.owner]
        if site.op is not ops.Weight or site.region != site.owner or not declares_features(module):
            return True
        return flow_of(module, _declared(module)[0], site.dtype).to_weight

    def hands_gradients_on(self, site: LeafSite) -> bool:
        """Tells whether the call of a layer has a gradient for what it is given; one of each class is asked."""
        module = self.modules[site.owner]
        key = (stands_for(module), site.quantised)
        if key not in self._hands_on:
            self._hands_on[key] = flow_of(module, site.in_features, site.dtype).to_input
        return self._hands_on[key]

    def _features(self, path: str, crossing: Crossing) -> list[int]:
        """Returns how many features examples show that a module reads and gives."""
        name = stands_for(self.modules[path]).__name__
        first = crossing.arguments[0]
        seen = (crossing.values.get(first), crossing.returned)
        if not all(isinstance(value, torch.Tensor) for value in seen) and self.example_inputs is not None:
            try:
                inputs, returned = _call_of(self.modules[""], self.modules[path], self.example_inputs)
            except TraceError as error:
                raise NoSiteError(str(error)) from error
            seen = (inputs.get(first) if isinstance(inputs, dict) else inputs[0], returned)
        elif self.example_inputs is None and seen == (None, None):
            raise NoSiteError(
                f"a {name} declares no in_features and out_features; pass example_inputs, which show them"
            )
        for what, value in zip(("is given", "returns"), seen, strict=True):
            if not isinstance(value, torch.Tensor) or not value.ndim or not value.is_floating_point():
                found = value.dtype if isinstance(value, torch.Tensor) and value.ndim else type(value).__name__
                raise NoSiteError(f"a {name} {what} a {found}, where an adapter needs a tensor with features")
        return [value.shape[-1] for value in seen]  # type: ignore[union-attr]

    def _tensors(self, path: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yields parameters with their owner's path and their name, those inside the module at `path` first."""
        inside = [other for other in self.modules if other == path or other.startswith(f"{path}.")]
        for owner in (*inside, *self.modules):
            for name, tensor in self.modules[owner]._parameters.items():
                if tensor is not None:
                    yield owner, name, tensor

    def inputs_of(self, path: str) -> ExampleInputs | None:
        """Returns what the example inputs of the model give the module at `path`; None without example inputs.

        Raises:
            TraceError: If they don't reach it.
        """
        if self.example_inputs is None:
            return None
        return _inputs_of(self.modules[""], self.modules[path], self.example_inputs)

    def _hidden_readers(self, owner: str, attribute: str) -> list[str]:
        """Returns the module around `owner` if its graph reads the weight where its source doesn't tell; else none.

        Raises:
            NoSiteError: If that can't be known.
        """
        path, inside = self._around(owner) if self._may_read else (None, "")
        if path is None or path not in self._may_read:
            return []
        uses = uses_in_forward(in_place.original_class(self.modules[path]))
        may_be_any = ANY in uses.read_elsewhere or _holds_readers(self.modules[path])
        if not may_be_any and attribute not in uses.read_elsewhere and inside not in uses.read:
            return []
        template = self._template(path)
        if template is not None:
            weight = f"{inside}.{attribute}"
            return [path] if any(ops.reads(graph, weight) for graph in template.graphs) else []
        if inside in uses.called:
            return []
        name = type(self.modules[path]).__name__
        raise NoSiteError(
            f"{name}.forward may read its {attribute} without calling it, which only the graph of {name} can tell: "
            f"{self._errors[path]}"
        )

    def _caller_outside(self, region: str, owner: str) -> str | None:
        """Returns a module around `owner`, other than the region that reads its weight, that calls it too."""
        graphs = self.templates[region].graphs
        called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
        path = owner
        while path:
            path = path.rpartition(".")[0]
            if path == region or not self._is_called(path):
                continue
            is_inside = path.startswith(f"{region}.") if region else True
            if is_inside and within(path, region) in called:
                return path
            if (
                not is_inside
                and within(owner, path) in uses_in_forward(in_place.original_class(self.modules[path])).called
            ):
                return path
        return None

    def _around(self, owner: str) -> tuple[str | None, str]:
        """Returns the innermost module with a forward around `owner`, and the path of `owner` in it."""
        path, inside = owner, ""
        while path:
            path, _, name = path.rpartition(".")
            inside = join(name, inside)
            if self._is_called(path):
                return path, inside
        return None, inside

    def _site(self, region: str, owner: str, attribute: str, weight: torch.Tensor, uses: _WeightUses) -> Site:
        if uses.is_called_beside:
            using = f"used in {', '.join(uses.others)}" if uses.others else "used in another way"
            raise NoSiteError(f"its {attribute} is {using}, and its module is called as well")
        if uses.is_unused:
            raise NoSiteError(f"no output depends on what is computed with its {attribute}")
        module = self.modules[owner]
        kind = _kind_of_layer(stands_for(module)) if attribute == "weight" else None
        if kind is None:
            self._warn_of_other_entries(region, owner, attribute)
        return Site(
            region=region,
            nodes=uses.nodes,
            op=uses.op,
            owner=owner,
            attribute=attribute,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
            layout=kind or uses.op,
            transposed=_is_stored_transposed(module, weight, kind, uses),
            is_layer=kind is not None,
            groups=plain_attribute(module, "groups", 1) if kind is ops.Convolution else uses.groups,
            shortens=uses.shortens,
            bias=join(region, uses.bias) if uses.bias is not None else None,
        )

    def _warn_of_other_entries(self, region: str, owner: str, attribute: str) -> None:
        """Warns if another method than the forward uses the weight: a call of that method isn't adapted."""
        if region != owner or _runs_graph(self.modules[region]):
            return
        cls = in_place.original_class(self.modules[region])
        public = sorted(name for name in methods_reading(cls, attribute) if name != "forward" and name[0] != "_")
        if public:
            warnings.warn(
                f"{cls.__name__}.{public[0]} uses {attribute}: the adapter acts where the forward calls it, and not "
                "where it is called by itself",
                stacklevel=2,
            )

    def _regions(self, owner: str) -> Iterator[str]:
        """Yields the paths at which a weight of `owner` may be used, the likeliest first."""
        if not self._graphs and self._is_called(owner):
            # by far the most frequent case, and at once its answer
            yield owner
        paths = [owner]
        while paths[-1]:
            paths.append(paths[-1].rpartition(".")[0])
        # what is a graph already is edited as a whole; otherwise the smallest module
        yield from (path for path in reversed(paths) if path in self._graphs)
        yield from (path for path in paths[not self._graphs :] if path not in self._graphs and self._is_called(path))

    def _is_called(self, path: str) -> bool:
        """Tells whether a module has a forward, which a container has not."""
        return type(self.modules[path]).forward is not nn.Module.forward

    def _template(self, path: str) -> Template | None:
        if path not in self.templates and path not in self._errors:
            module = self.modules[path]
            try:
                found = template_of(module) or self.known.get(path) or self._lift(module)
                if found.calls_own_forward:
                    raise TraceError(
                        "an adapter changes what it is given, so that its graph only calls its code; unload that "
                        "adapter, put this one on first, and then that one"
                    )
                self.templates[path] = found
            except TraceError as error:
                self._errors[path] = error
        return self.templates.get(path)

    def _lift(self, module: nn.Module) -> Template:
        try:
            return lift(module)
        except NeedsInputsError:
            if self.example_inputs is None:
                raise
            return lift(module, _inputs_of(self.modules[""], module, self.example_inputs))


def _crossing(region: str, graphs: Graphs, names: tuple[tuple[str, ...], ...]) -> Crossing:
    found = [boundary_of(graph, name) for graph, of_graph in zip(graphs, names, strict=True) for name in of_graph]
    if found[0].arguments and found[0].arguments[0] not in found[0].inputs:
        raise TraceError(f"its first argument, {found[0].arguments[0]}, isn't one value of the graph")
    values = {name: node.meta[VALUE] for name, node in found[0].inputs.items() if VALUE in node.meta}
    return Crossing(region, names, found[0].arguments, values, found[0].output.meta.get(VALUE))


class _WeightUses(NamedTuple):
    """What a graph does with one weight.

    Attributes:
        op: The kind of the operations that use it, or ``ops.Weight`` if they are of several kinds, or of none.
        nodes: The names of the operations that use it, in each graph; or of the nodes that read it.
        transposed: Whether the first of them reads it as (in, out).
        groups: Into how many groups they divide their features.
        shortens: Whether one of them shortens the rows that it reads.
        others: What else uses it.
        is_called_beside: Whether it is used by calls of its module and in another way, too.
        is_unused: Whether nothing that is computed with it reaches an output.
        bias: The path of the tensor that all operations add, or None.
    """

    op: Any
    nodes: tuple[tuple[str, ...], ...]
    transposed: bool
    groups: int
    shortens: bool
    others: tuple[str, ...]
    is_called_beside: bool
    is_unused: bool
    bias: str | None


def _uses(template: Template, module: nn.Module) -> dict[str, _WeightUses]:
    """Returns what the graphs do with each weight, by the weight's path in `module`."""
    uses: dict[str, _WeightUses] | None = template.facts.get("uses")
    if uses is None:
        found = [ops.find_ops(graph, module) for graph in template.graphs]
        alive = set().union(*(dataflow.reaching_output(graph) for graph in template.graphs))
        paths = [op.weight for of_graph in found for op in of_graph]
        paths += [str(node.target) for graph in template.graphs for node in graph.nodes if node.op == "get_attr"]
        uses = {path: _uses_of(path, template, module, found, alive) for path in dict.fromkeys(paths)}
        template.facts["uses"] = uses
    return uses


def _uses_of(
    path: str, template: Template, module: nn.Module, found: list[list[ops.Computation]], alive: set[fx.Node]
) -> _WeightUses:
    own = [[op for op in of_graph if op.weight == path] for of_graph in found]
    all_own = [op for of_graph in own for op in of_graph]
    by_graph = zip(template.graphs, own, strict=True)
    others = tuple(dict.fromkeys(itertools.chain(*(ops.other_uses(graph, path, using) for graph, using in by_graph))))
    kinds = {(type(op), _number(op.groups, module)) for op in all_own}
    is_of_one_kind = len(kinds) == 1 and not others
    places = own if is_of_one_kind else [ops.reads(graph, path) for graph in template.graphs]
    nodes = tuple(tuple(op.name for op in of_graph) for of_graph in places)
    op, groups = next(iter(kinds)) if is_of_one_kind else (ops.Weight, 1)
    is_unused = not any(op.node in alive for of_graph in places for op in of_graph)
    is_called_beside = not is_of_one_kind and any(op.node.op == "call_module" for op in all_own)
    transposed = bool(all_own) and all_own[0].transposed
    biases = {op.bias for op in all_own} if is_of_one_kind else set()
    bias = biases.pop() if len(biases) == 1 else None
    shortens = any(isinstance(op, ops.Embedding) and op.shortens for op in all_own)
    return _WeightUses(op, nodes, transposed, groups, shortens, others, is_called_beside, is_unused, bias)


def _number(value: Any, module: nn.Module) -> int:
    """Returns a number that a graph has, or reads from the module."""
    return operator.attrgetter(str(value.target))(module) if isinstance(value, fx.Node) else value


def linear_classes() -> tuple[type, ...]:
    """Returns the classes that PEFT adapts as modules with a linear weight."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, pytorch_utils.Conv1D) if pytorch_utils is not None else (nn.Linear,)


def declares_features(module: nn.Module) -> bool:
    """Tells whether a module says how many features it reads and gives, as layers do."""
    return all(type(count) is int for count in _declared(module))


def _declared(module: nn.Module) -> list[Any]:
    return [plain_attribute(module, name, None) for name in ("in_features", "out_features")]


def _kind_of_layer(cls: type) -> type | None:
    """Returns the kind of operation that a layer is, or None for other modules."""
    kinds = {ops.Linear: linear_classes(), ops.Convolution: convolution.LAYERS, ops.Embedding: embedding.LAYERS}
    return next((kind for kind, classes in kinds.items() if issubclass(cls, classes)), None)


def _is_stored_transposed(module: nn.Module, weight: torch.Tensor, kind: type | None, uses: _WeightUses) -> bool:
    """Tells whether a weight is stored as (in, out)."""
    cls = stands_for(module)
    if kind is ops.Linear:
        return not issubclass(cls, nn.Linear)  # of the layers, only Conv1D does
    if kind is ops.Convolution:
        return issubclass(cls, convolution.TRANSPOSED_LAYERS)
    if uses.op is ops.Weight and weight.ndim == 3:
        # so PEFT knows the modules that have experts as (experts, in, out)
        return plain_attribute(module, "is_transposed", False)
    return uses.transposed


def _readers(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], list[str]]:
    """Returns, by owner and name, the weights that modules around their owner read, with the paths of these modules."""
    found: dict[tuple[str, str], list[str]] = {}
    paths = {id(module): path for path, module in modules.items()}
    for path, module in modules.items():
        if _runs_graph(module) or not module._modules or _is_off(module):
            continue  # a graph tells by itself
        for read in uses_in_forward(in_place.original_class(module)).read:
            inside, _, name = read.rpartition(".")
            owner = _inside(module, inside)
            # a module in several places is known by its first one
            if owner is not None and inside and name in owner._parameters:
                found.setdefault((paths[id(owner)], name), []).append(path)
    return found


def _inside(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _may_read(modules: Mapping[str, nn.Module]) -> set[str]:
    """Returns the modules whose forward hands on a module inside, or reads attributes of what isn't a path from it."""
    found = set()
    for path, module in modules.items():
        if _runs_graph(module) or not module._modules or _is_off(module):
            continue
        uses = uses_in_forward(in_place.original_class(module))
        if uses.read_elsewhere or _holds_readers(module) or any(join(path, read) in modules for read in uses.read):
            found.add(path)
    return found


def _holds_readers(module: nn.Module) -> bool:
    """Tells whether a module holds parameters in lists and the like, or closures, by which it may read others'."""
    waiting = [value for name, value in module.__dict__.items() if name not in _TABLES]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list | tuple):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, nn.Parameter) or (inspect.isfunction(value) and value.__closure__):
            return True
    return False


_TABLES = frozenset(vars(nn.Module()))
"""What every module has: its parameters, its submodules, its hooks."""


def _runs_graph(module: nn.Module) -> bool:
    """Tells whether a graph is all that a module runs, and not only what stands around its own code."""
    if not isinstance(module, fx.GraphModule):
        return False
    template = template_of(module)
    return template is None or not template.calls_own_forward


def _is_off(module: nn.Module) -> bool:
    """Tells whether the code of a module that reads weights without calling their modules is switched off."""
    return isinstance(module, nn.TransformerEncoderLayer) and not torch.backends.mha.get_fastpath_enabled()


class _ReachedError(Exception):
    """Ends a run of the model as soon as it reaches a module."""


def _inputs_of(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> ExampleInputs:
    """Runs the model on the example inputs and returns those that reach `module` first; the model stays as it is."""
    seen: list[ExampleInputs] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_given(module, args, kwargs))
        raise _ReachedError

    _run_until(model, module, example_inputs, lambda copied: copied.register_forward_pre_hook(stop, with_kwargs=True))
    return seen[0]


def _call_of(model: nn.Module, module: nn.Module, example_inputs: ExampleInputs) -> tuple[ExampleInputs, Any]:
    """Runs the model as `_inputs_of` does, and returns what `module` was given, and what it returned."""
    seen: list[tuple[ExampleInputs, Any]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((_given(module, args, kwargs), output))
        raise _ReachedError

    _run_until(model, module, example_inputs, lambda copied: copied.register_forward_hook(stop, with_kwargs=True))
    return seen[0]


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExampleInputs:
    return {**inspect.signature(module.forward).bind(*args, **kwargs).arguments} if kwargs else args


def _run_until(
    model: nn.Module, module: nn.Module, example_inputs: ExampleInputs, stop_at: Callable[[nn.Module], Any]
) -> None:
    """Runs a copy of the model with a hook on `module` that ends the run, which `stop_at` registers."""
    # in a copy, whatever the modules on the way do to themselves is lost
    copied = copy.deepcopy({"model": model, "module": module})
    hook = stop_at(copied["module"])
    args, kwargs = split_inputs(example_inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copied["model"](*(args or ()), **kwargs)
    except _ReachedError:
        return
    finally:
        hook.remove()
    raise TraceError("the example inputs don't reach it; pass example_inputs for which the model runs it")
