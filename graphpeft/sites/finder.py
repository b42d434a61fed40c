"""Finds the site of a weight: the operations that use it, in the smallest graph that holds them all."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphpeft.code.source import methods_reading, read_anew, uses_in_forward
from graphpeft.graph import in_place, ops
from graphpeft.graph.computed_weights import computed_from, read_weight
from graphpeft.graph.errors import TraceError
from graphpeft.graph.forward_classes import class_of_forward
from graphpeft.graph.guards import fixed_arguments
from graphpeft.graph.holders import has_holders
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.ops import convolution
from graphpeft.graph.own_forward import call_on_weights
from graphpeft.graph.paths import join, within
from graphpeft.graph.replaceable import refuse_what_a_graph_cannot_replace
from graphpeft.graph.template import runs_graph
from graphpeft.graph.traced_model import plain_attribute, stands_for
from graphpeft.peft_errors import PeftWarning
from graphpeft.sites.around_forwards import AroundForwards
from graphpeft.sites.layer_kinds import kind_of_layer
from graphpeft.sites.quantised import described, is_quantised
from graphpeft.sites.readers import Readers
from graphpeft.sites.regions import Lifted, Regions
from graphpeft.sites.set_forwards import computes_otherwise
from graphpeft.sites.site import NoSiteError, Site
from graphpeft.sites.weight_uses import WeightUses, number_in, weight_uses


class Known(NamedTuple):
    """What earlier calls have found in a model.

    Attributes:
        regions: The regions that adapters have changed, by path.
        sites: The sites that adapters have, by the path of the weight's module and the weight's name there.
    """

    regions: Mapping[str, Lifted]
    sites: Mapping[tuple[str, str], Site]


NOTHING_KNOWN = Known({}, {})


class SiteFinder:
    """Finds the sites of weights in one model, recording each module's graph once; the model stays unchanged.

    Args:
        model: The model.
        known: What earlier calls have found in the model.
        example_inputs: Inputs of the model, for modules whose forward branches on its inputs.

    Attributes:
        regions: The model's modules and their graphs.
        modules: The modules that may have sites, by path.
        templates: The graphs of the regions recorded so far, by path.
        found: The sites of weights found so far, by the path of the weight's module and the weight's name there.
    """

    def __init__(self, model: nn.Module, known: Known, example_inputs: ExampleInputs | None = None) -> None:
        read_anew()
        self.regions = Regions(model, known.regions, example_inputs)
        self.modules, self.templates = self.regions.modules, self.regions.templates
        self.found: dict[tuple[str, str], Site] = {}
        self._known = known
        self._with_sites: set[str] = set()

    @functools.cached_property
    def readers(self) -> Readers:
        """The modules that read weights of other modules."""
        return Readers(self.regions)

    @functools.cached_property
    def _around_forwards(self) -> AroundForwards:
        return AroundForwards(self.modules)

    def find(self, owner: str, attribute: str) -> Site:
        """Returns the site of a weight.

        Args:
            owner: The path of the module that owns the weight.
            attribute: The weight's name in its owner.

        Raises:
            NoSiteError: If the weight has no site.
        """
        weight = read_weight(self.modules[owner], attribute)
        assert weight is not None
        if is_lazy(weight):
            raise NoSiteError(f"its {attribute} has no shape yet; run the model once before you adapt it")
        if is_quantised(weight):
            raise NoSiteError(
                f"its {attribute} is quantised ({described(weight)}), and no change can be added to that; name the "
                "module that computes with it in target_modules"
            )
        known = self._known.sites.get((owner, attribute))
        site = (known and self._as_known(known, weight)) or self._new_site(owner, attribute, weight)
        self._with_sites.add(site.region)
        self.found[owner, attribute] = site
        return site

    def _as_known(self, site: Site, weight: torch.Tensor) -> Site | None:
        """Returns the site that an adapter has if its region's graph is as it was then, but for adapters; or None."""
        region = site.region
        if region not in self._known.regions or region not in self.modules or region in self.regions.graphs:
            return None
        if not has_holders(self.modules[site.owner]):
            return None  # the adapter was deleted, and anything may have changed since
        template = self.regions.present(region)
        # somebody has edited the graph of one that isn't shared
        if template is None or not template.shared or site.shape != tuple(weight.shape):
            return None
        self.templates[region] = template
        return site._replace(dtype=weight.dtype)

    def _new_site(self, owner: str, attribute: str, weight: torch.Tensor) -> Site:
        """Returns the site of a weight, found in graphs and in code."""
        readers = self.readers.of(owner, attribute)
        region, uses = self._region(owner, attribute, readers)
        is_read = region in readers or (region in self.regions.graphs and region != owner)
        if self._is_more_than_operations(region, owner, uses):
            uses = self._uses_of_own_forward_anew(region, owner, attribute, uses)
        caller = self._caller_outside(region, owner) if is_read else None
        if caller is not None:
            raise NoSiteError(
                f"its {attribute} is read by {region or 'the model'}, and its module is called by "
                f"{caller or 'the model'}"
            )
        return self._site(region, owner, attribute, weight, uses)

    def _region(self, owner: str, attribute: str, readers: list[str]) -> tuple[str, WeightUses]:
        """Returns the path of the smallest module whose graph uses a weight, and the graph's uses of the weight.

        Args:
            owner: The path of the module that owns the weight.
            attribute: The weight's name in its owner.
            readers: The paths of modules around the owner that read the weight without calling the owner.

        Raises:
            NoSiteError: If there is no such module.
        """
        if len(readers) > 1:
            outermost = min(readers, key=len)
            if all(not outermost or path == outermost or path.startswith(f"{outermost}.") for path in readers):
                uses = self._uses_of_own_forward(outermost, owner, attribute)
                if uses is not None:
                    return outermost, uses
            names = ", ".join(path or "the model" for path in readers)
            raise NoSiteError(f"its {attribute} is read by several modules: {names}")
        reasons = []
        for region in readers or self._regions(owner):
            if self.regions.template(region) is None:
                reasons.append(f"{region or 'the model'} can't become a graph: {self.regions.errors[region]}")
                continue
            uses = self.regions.uses(region, owner, attribute)
            if uses is not None:
                return region, uses
        likeliest = readers[0] if readers else owner
        if likeliest in self.regions.errors:
            uses = self._uses_of_own_forward(likeliest, owner, attribute)
            if uses is not None:
                return likeliest, uses
        raise NoSiteError("; ".join(reasons) or f"no operation that a rule adapts uses its {attribute}")

    def _uses_of_own_forward(self, region: str, owner: str, attribute: str) -> WeightUses | None:
        """Returns the uses of a weight in a graph that calls the module's own forward on changed weights, or None.

        All readers of the weight inside the forward see the change, and the module need not be traced. The region gets
        this graph as its template.
        """
        module, weight = self.modules[region], join(within(owner, region), attribute)
        if not self.regions.is_called(region) or self.regions.is_set_on_model(region):
            return None
        try:
            template = self.templates.get(region) or self.regions.present(region)
            if template is None:
                refuse_what_a_graph_cannot_replace(module)
                template = call_on_weights(module, weight)
        except TraceError:
            return None
        found = weight_uses(template, module) if template.calls_own_forward else {}
        uses = found.get(weight)
        if uses is not None:
            self.templates[region] = template
        return uses

    def _is_more_than_operations(self, region: str, owner: str, uses: WeightUses) -> bool:
        """Returns whether a weight is used by calls of its module that no operation stands for, and beside them."""
        return uses.is_called_beside or (region != owner and self._is_called_beside(region, owner, uses))

    def _uses_of_own_forward_anew(self, region: str, owner: str, attribute: str, uses: WeightUses) -> WeightUses:
        """Returns the uses of a weight in a graph that calls the region's own forward, in place of its recorded graph.

        Raises:
            NoSiteError: If the region's graph has other sites or another adapter already, if an embedding shortens rows
                of the weight itself, or if there is no such graph.
        """
        using = f"used in {', '.join(uses.others)}" if uses.others else "used in another way"
        reason = f"its {attribute} is {using}, and its module is called as well"
        if uses.shortens:
            raise NoSiteError(f"{reason}, which shortens its rows by max_norm")
        has_graph = region in self._with_sites or region in self.regions.graphs or self._is_known(region)
        if not has_graph:
            recorded = self.templates.pop(region)
            found = self._uses_of_own_forward(region, owner, attribute)
            if found is not None:
                self.regions.errors[region] = TraceError(f"it calls {owner}, and uses its {attribute} beside that")
                return found
            self.templates[region] = recorded
        others = f", and {region or 'the model'} has a graph for other weights" if has_graph else ""
        raise NoSiteError(f"{reason}{others}; adapt a graph of the whole model, graphpeft.trace(model, example_inputs)")

    def _is_known(self, region: str) -> bool:
        return region in self.regions.known and self.regions.present(region) is not None

    def _caller_outside(self, region: str, owner: str) -> str | None:
        """Returns a module around `owner` that calls it, other than the region that reads its weight, or None."""
        graphs = self.templates[region].graphs
        called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
        path = owner
        while path:
            path = path.rpartition(".")[0]
            if path == region or not self.regions.is_called(path):
                continue
            is_inside = path.startswith(f"{region}.") if region else True
            if is_inside and within(path, region) in called:
                return path
            if not is_inside and within(owner, path) in uses_in_forward(class_of_forward(self.modules[path])).called:
                return path
        return None

    def _site(self, region: str, owner: str, attribute: str, weight: torch.Tensor, uses: WeightUses) -> Site:
        if uses.is_unused:
            raise NoSiteError(f"no output depends on what is computed with its {attribute}")
        module, around = self.modules[owner], self.modules[region]
        cls = stands_for(module)
        kind = kind_of_layer(cls) if attribute == "weight" else None
        conflict = uses.bias_conflict
        if uses.bias is not None and not _is_parameter(around, uses.bias):
            conflict = f"its bias {uses.bias} is no parameter"
        if kind is None or region != owner:
            self._refuse_reads_around(region, owner, attribute, kind is not None)
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
            transposed=_is_stored_transposed(module, cls, weight, kind, uses),
            is_layer=kind is not None,
            groups=plain_attribute(module, "groups", 1) if kind is ops.Convolution else number_in(around, uses.groups),
            shortens=uses.shortens,
            bias=join(region, uses.bias) if uses.bias is not None else None,
            bias_conflict=conflict,
            both_ways=uses.both_ways,
            own_code=self._why_own_code(region),
            fixed=self._fixed_arguments(region),
            computed=computed_from(module, attribute),
            set_forward=computes_otherwise(module) if self.templates[region].calls_set_forward else None,
        )

    def _refuse_reads_around(self, region: str, owner: str, attribute: str, is_layer: bool) -> None:
        """Raises NoSiteError if hooks or a ``__call__`` may read a weight around the graph, where no adapter acts."""
        runs_inside = self.templates[region].calls_own_forward

        def skips(path: str) -> bool:
            # the region's own code reads the changed weight wherever it goes; a layer whose weight is read isn't called
            is_inside = path != region and (not region or path.startswith(f"{region}."))
            return (runs_inside and is_inside) or (is_layer and path == owner)

        around = self._around_forwards.reading(owner, attribute, skips)
        if around is not None:
            raise NoSiteError(
                f"its {attribute} may be read by {around.description} too, where no adapter acts; {around.way_out}"
            )

    def _why_own_code(self, region: str) -> str | None:
        if not self.templates[region].calls_own_forward:
            return None
        error = self.regions.errors.get(region)
        return str(error) if error is not None else "an adapter of it runs it so"

    def _fixed_arguments(self, region: str) -> tuple[str, ...]:
        """Returns the arguments of a recorded forward that can have one value alone; a graph's report has its own."""
        if region in self.regions.graphs or kind_of_layer(stands_for(self.modules[region])) is not None:
            return ()
        return fixed_arguments(self.templates[region].graphs)

    def _is_called_beside(self, region: str, owner: str, uses: WeightUses) -> bool:
        """Returns whether a region calls a weight's owner in other nodes than the site's, or the owner has hooks."""
        target, graphs = within(owner, region), self.templates[region].graphs
        calls = [
            (node, names)
            for graph, names in zip(graphs, uses.nodes, strict=True)
            for node in graph.nodes
            if node.op == "call_module" and node.target == target
        ]
        module = self.modules[owner]
        # with hooks, a branch in the graph of an outer module would act after them; a flat graph's hooks came later
        is_hooked = region not in self.regions.graphs and bool(module._forward_hooks or module._forward_pre_hooks)
        return any(node.name not in names or is_hooked for node, names in calls)

    def _warn_of_other_entries(self, region: str, owner: str, attribute: str) -> None:
        """Warns if another public method than the forward uses the weight: a call of that method isn't adapted."""
        if region != owner or runs_graph(self.modules[region]):
            return
        cls = in_place.original_class(self.modules[region])
        public = sorted(name for name in methods_reading(cls, attribute) if name != "forward" and name[0] != "_")
        if public:
            warnings.warn(
                f"{cls.__name__}.{public[0]} uses {attribute}: the adapter acts where the forward calls it, and not "
                "where it is called by itself",
                PeftWarning,
                stacklevel=2,
            )

    def _regions(self, owner: str) -> Iterator[str]:
        """Yields the paths of the regions that may use a weight of `owner`, the likeliest first."""
        if not self.regions.graphs and self.regions.is_called(owner):
            # by far the most frequent answer, so the other paths are computed only on demand
            yield owner
        paths = [owner]
        while paths[-1]:
            paths.append(paths[-1].rpartition(".")[0])
        # graphs come first, since a graph is edited as a whole; then the other modules, the smallest first
        yield from (path for path in reversed(paths) if path in self.regions.graphs)
        yield from (
            path
            for path in paths[not self.regions.graphs :]
            if path not in self.regions.graphs and self.regions.is_called(path)
        )


def _is_stored_transposed(
    module: nn.Module, cls: type, weight: torch.Tensor, kind: type | None, uses: WeightUses
) -> bool:
    """Returns whether a weight is stored as (in, out); `cls` is the original class of its module."""
    if kind is ops.Linear:
        return not issubclass(cls, nn.Linear)  # the other linear layer, Conv1D, stores (in, out)
    if kind is ops.Convolution:
        return issubclass(cls, convolution.TRANSPOSED_LAYERS)
    if uses.op is ops.Weight and weight.ndim == 3:
        # PEFT reads the same attribute for weights of experts stored as (experts, in, out)
        return plain_attribute(module, "is_transposed", False)
    return uses.transposed


def _is_parameter(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return name in module.get_submodule(owner)._parameters
