"""Finds where a weight is used: the operations of the smallest graph that holds them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.source import methods_reading, uses_in_forward
from graphpeft.graph import in_place, ops
from graphpeft.graph.errors import NeedsInputsError, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.layers import given
from graphpeft.graph.ops import convolution
from graphpeft.graph.ops.boundaries import NAME, boundaries_inside, boundary_of
from graphpeft.graph.own_forward import call_on_weights, call_through
from graphpeft.graph.paths import join, within
from graphpeft.graph.replaceable import refuse_what_a_graph_cannot_replace
from graphpeft.graph.template import VALUE, Graphs, Template, runs_graph, template_of
from graphpeft.graph.traced_model import plain_attribute, stands_for
from graphpeft.sites import example_runs
from graphpeft.sites.gradient_flow import flow_of
from graphpeft.sites.layer_kinds import declared_features, declares_features, kind_of_layer
from graphpeft.sites.parts import Runs, parts_found
from graphpeft.sites.quantised import described, is_quantised, way_of_computing
from graphpeft.sites.readers import held_outside, may_read, readers_around
from graphpeft.sites.site import LeafSite, OneCall, Site
from graphpeft.sites.weight_uses import WeightUses, number_in, weight_uses
from graphpeft.tracing.lift import lift


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


_ASK_ONLY = (nn.TransformerEncoder,)
"""Classes whose forward names weights of modules inside, and uses no values of them: only where they are, and so on."""


class NoSiteError(Exception):
    """Why a weight, or a module, is no site."""


class SiteFinder:
    """Finds sites in one model, recording each module's graph once; the model stays as it is.

    Args:
        model: The model.
        known: Graphs of regions that were recorded before, by path.
        example_inputs: Inputs of the model, for modules whose forward decides on theirs.

    Attributes:
        modules: The modules in which there may be sites, by path.
        scripted: Why there can't be any in the others, by path: those of ``torch.jit``.
        templates: The graphs of the regions that were looked into, by path.
    """

    def __init__(
        self, model: nn.Module, known: Mapping[str, Template], example_inputs: ExampleInputs | None = None
    ) -> None:
        modules = dict(model.named_modules())
        self.scripted = _scripted(modules)
        self.modules = {path: module for path, module in modules.items() if path not in self.scripted}
        self.known = known
        self.example_inputs = example_inputs
        self.templates: dict[str, Template] = {}
        self._graphs = {path for path, module in self.modules.items() if runs_graph(module)}
        self._errors: dict[str, TraceError] = {}
        self._hands_on: dict[tuple[type, str | None], bool] = {}
        self._readers = readers_around(self.modules)
        self._may_read = may_read(self.modules)
        self._held = held_outside(self.modules)

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
        if is_lazy(weight):
            raise NoSiteError(f"its {attribute} has no shape yet; run the model once before you adapt it")
        if is_quantised(weight):
            raise NoSiteError(
                f"its {attribute} is quantised ({described(weight)}), and no change can be added to that; name the "
                "module that computes with it in target_modules"
            )
        readers = self.readers(owner, attribute)
        region = self._region(owner, attribute, readers)
        is_read = region in readers or (region in self._graphs and region != owner)
        caller = self._caller_outside(region, owner) if is_read else None
        if caller is not None:
            raise NoSiteError(
                f"its {attribute} is read by {region or 'the model'}, and its module is called by "
                f"{caller or 'the model'}"
            )
        uses = self._uses(region, owner, attribute)
        assert uses is not None
        return self._site(region, owner, attribute, weight, uses)

    def readers(self, owner: str, attribute: str) -> list[str]:
        """Returns the paths of modules around the owner of a tensor that read it without calling the owner.

        Args:
            owner: The path of the module that owns the tensor.
            attribute: The tensor's name in it.

        Raises:
            NoSiteError: If that can't be known, or a module elsewhere may read it.
        """
        return (
            self._readers.get((owner, attribute))
            or self._hidden_readers(owner, attribute)
            or self._readers_outside(owner, attribute)
        )

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
        uses = weight_uses(template, module) if template.calls_own_forward else {}
        if join(within(owner, region), attribute) not in uses:
            return False
        self.templates[region] = template
        return True

    def _uses(self, region: str, owner: str, attribute: str) -> WeightUses | None:
        """Returns what the graph of a region does with a weight, or None if it doesn't use it."""
        return weight_uses(self.templates[region], self.modules[region]).get(join(within(owner, region), attribute))

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
        if site.region and runs_graph(self.modules[""]):
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
        features = declared_features(module) if declares_features(module) else self._features(path, crossing)
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
        return flow_of(module, declared_features(module)[0], site.dtype).to_weight

    def hands_gradients_on(self, site: LeafSite) -> bool:
        """Tells whether the call of a layer has a gradient for what it is given; one of each kind is asked."""
        module = self.modules[site.owner]
        weight = module._parameters.get("weight")
        key = (stands_for(module), None if weight is None else way_of_computing(weight))
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
                inputs, returned = example_runs.call_of(self.modules[""], self.modules[path], self.example_inputs)
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
        return example_runs.inputs_of(self.modules[""], self.modules[path], self.example_inputs)

    def _hidden_readers(self, owner: str, attribute: str) -> list[str]:
        """Returns the modules around `owner` whose graphs read the weight where their code doesn't tell.

        Raises:
            NoSiteError: If that can't be known.
        """
        found = []
        nearest, _ = self._around(owner) if self._may_read else (None, "")
        path = nearest
        while path is not None:
            if self._reads_hidden(path, within(owner, path), attribute, is_nearest=path == nearest):
                found.append(path)
            path, _ = self._around(path)
        return found

    def _reads_hidden(self, path: str, inside: str, attribute: str, is_nearest: bool) -> bool:
        """Tells whether a module's graph reads a weight inside it; its code need not tell."""
        may = self._may_read.get(path)
        if may is None or in_place.original_class(self.modules[path]) in _ASK_ONLY:
            return False
        names = may.names if is_nearest else may.names - {ANY}
        if names.isdisjoint((attribute, ANY)) and not (is_nearest and inside in may.handed_on):
            return False
        template = self._template(path)
        if template is not None:
            return any(ops.reads(graph, f"{inside}.{attribute}") for graph in template.graphs)
        cls = in_place.original_class(self.modules[path])
        if inside in uses_in_forward(cls).called:
            return False
        raise NoSiteError(
            f"{cls.__name__}.forward may read its {attribute} without calling it, which only the graph of "
            f"{cls.__name__} can tell: {self._errors[path]}"
        )

    def _readers_outside(self, owner: str, attribute: str) -> list[str]:
        """Returns a module around `owner` whose graph reads the weight by what it holds without registering it.

        Raises:
            NoSiteError: If a module elsewhere does, since only the graph of the whole model has both.
        """
        for path, name in self._held.get((owner, attribute), ()):
            if path and not owner.startswith(f"{path}."):
                raise NoSiteError(
                    f"{path} may read its {attribute} by what it holds in self.{name}, where no adapter of its module "
                    "acts; adapt a graph of the whole model, graphpeft.trace(model, example_inputs)"
                )
            template = self._template(path)
            if template is None:
                raise NoSiteError(
                    f"{path or 'the model'} may read its {attribute} by what it holds in self.{name}, which only its "
                    f"graph can tell: {self._errors[path]}"
                )
            weight = join(within(owner, path), attribute)
            if any(ops.reads(graph, weight) for graph in template.graphs):
                return [path]
        return []

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

    def _site(self, region: str, owner: str, attribute: str, weight: torch.Tensor, uses: WeightUses) -> Site:
        if uses.is_called_beside or (region != owner and self._is_called_beside(region, owner, uses)):
            using = f"used in {', '.join(uses.others)}" if uses.others else "used in another way"
            raise NoSiteError(f"its {attribute} is {using}, and its module is called as well")
        if uses.is_unused:
            raise NoSiteError(f"no output depends on what is computed with its {attribute}")
        module, around = self.modules[owner], self.modules[region]
        kind = kind_of_layer(stands_for(module)) if attribute == "weight" else None
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
            groups=plain_attribute(module, "groups", 1) if kind is ops.Convolution else number_in(around, uses.groups),
            shortens=uses.shortens,
            bias=join(region, uses.bias) if uses.bias is not None else None,
        )

    def _is_called_beside(self, region: str, owner: str, uses: WeightUses) -> bool:
        """Tells whether a region calls the owner of a weight where that is no operation of the site, or not alone."""
        target, graphs = within(owner, region), self.templates[region].graphs
        calls = [
            (node, names)
            for graph, names in zip(graphs, uses.nodes, strict=True)
            for node in graph.nodes
            if node.op == "call_module" and node.target == target
        ]
        module = self.modules[owner]
        # in a flat graph they were put on since; in that of a module around, the branch would be behind them
        is_hooked = region not in self._graphs and bool(module._forward_hooks or module._forward_pre_hooks)
        return any(node.name not in names or is_hooked for node, names in calls)

    def _warn_of_other_entries(self, region: str, owner: str, attribute: str) -> None:
        """Warns if another method than the forward uses the weight: a call of that method isn't adapted."""
        if region != owner or runs_graph(self.modules[region]):
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
            template = given(module) or lift(module)
        except NeedsInputsError:
            # a layer of PyTorch's decides in each call how it computes, as an attention on its fast path, of which a
            # recording would have one way: it runs its own code
            is_of_pytorch = in_place.original_class(module).forward.__module__.startswith("torch.nn.")
            if self.example_inputs is None or is_of_pytorch:
                raise
            return lift(module, example_runs.inputs_of(self.modules[""], module, self.example_inputs))
        if self.example_inputs is None:
            return template
        # the graph has the defaults of what the model itself gives
        inputs = example_runs.inputs_beyond_defaults(self.modules[""], module, self.example_inputs)
        return template if inputs is None else lift(module, inputs)


def _scripted(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the paths of scripted modules, and of those inside of such, with the reason why they can't be adapted."""
    found: dict[str, str] = {}
    for path, module in modules.items():
        around = path.rpartition(".")[0]
        if path and around in found:
            found[path] = found[around]
        elif isinstance(module, torch.jit.ScriptModule):
            found[path] = (
                f"{path or 'the model'} is a ScriptModule, which can't be changed any more; put the module that it was "
                "made from in its place, and adapt that"
            )
    return found


def _crossing(region: str, graphs: Graphs, names: tuple[tuple[str, ...], ...]) -> Crossing:
    found = [boundary_of(graph, name) for graph, of_graph in zip(graphs, names, strict=True) for name in of_graph]
    if found[0].arguments and found[0].arguments[0] not in found[0].inputs:
        raise TraceError(f"its first argument, {found[0].arguments[0]}, isn't one value of the graph")
    values = {name: node.meta[VALUE] for name, node in found[0].inputs.items() if VALUE in node.meta}
    return Crossing(region, names, found[0].arguments, values, found[0].output.meta.get(VALUE))


def _is_stored_transposed(module: nn.Module, weight: torch.Tensor, kind: type | None, uses: WeightUses) -> bool:
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
