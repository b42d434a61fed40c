"""Finds the site of a weight: the operations that use it, in the smallest graph that holds them all.

A layer's own graph comes first, so whoever calls the layer is adapted. Where no graph shows the uses of a weight, the
model's code runs as it is, on the changed weight that the attribute gives, see `adapters/reads.py`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from graphpeft._torch import FORWARD_HOOKS_OF_ALL
from graphpeft.code.contents import PLAIN
from graphpeft.code.reach import opened
from graphpeft.code.source import read_anew
from graphpeft.graph import in_place, ops
from graphpeft.graph.computed_weights import computed_from, read_weight
from graphpeft.graph.errors import TraceError
from graphpeft.graph.guards import fixed_arguments
from graphpeft.graph.holders import has_holders
from graphpeft.graph.hosts.patched_code import holds_own_tensor
from graphpeft.graph.hosts.patched_forwards import KNOWN, OF_HOOKS, patched_forward
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.layers import is_given
from graphpeft.graph.ops import convolution
from graphpeft.graph.own_forward import own_code
from graphpeft.graph.paths import join, within
from graphpeft.graph.traced_model import plain_attribute, stands_for
from graphpeft.sites.asked_once import likeness
from graphpeft.sites.layer_kinds import kind_of_layer
from graphpeft.sites.quantised import described, is_quantised
from graphpeft.sites.regions import Lifted, Regions
from graphpeft.sites.site import NoSiteError, Site
from graphpeft.sites.weight_uses import WeightUses, number_in
from graphpeft.tracing.graph_equality import checks_all_of, equivalent
from graphpeft.tracing.module_graphs import lift_forward


class Known(NamedTuple):
    """The findings of earlier calls in a model.

    Attributes:
        regions: The regions that adapters have changed, by path.
        sites: The sites that adapters have, by the path of the weight's module and the weight's name there.
    """

    regions: Mapping[str, Lifted]
    sites: Mapping[tuple[str, str], Site]


NOTHING_KNOWN = Known({}, {})


class SiteFinder:
    """Finds the sites of weights in one model, recording each module's graph once; the model stays unchanged.

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
        self._held = HeldParameters(self.modules)
        self._firsts: dict[Hashable, Site] = {}

    def find(self, owner: str, attribute: str) -> Site:
        """Returns the site of a weight."""
        module = self.modules[owner]
        held = self._held.place_of(module, attribute)
        alike = self._likeness(owner, attribute) if held is None else None
        first = self._firsts.get(alike) if alike is not None else None
        if first is not None:
            self.templates[owner] = self.templates[first.owner]
            site = first._replace(region=owner, owner=owner, bias=first.bias and join(owner, "bias"))
            self.found[owner, attribute] = site
            return site
        weight = read_weight(module, attribute)
        assert weight is not None
        if is_lazy(weight):
            raise NoSiteError(f"its {attribute} has no shape yet; run the model once before you adapt it")
        if is_quantised(weight):
            raise NoSiteError(
                f"its {attribute} is quantised ({described(weight)}), and no change can be added to that; name the "
                "module that computes with it in target_modules"
            )
        known = self._known.sites.get((owner, attribute))
        site = (known and self._as_known(known, weight)) or self._new_site(owner, attribute, weight, held)
        self.found[owner, attribute] = site
        # a recorded graph may depend on more than options, such as the layout in memory
        if alike is not None and site.region == owner and is_given(self.templates[owner]):
            self._firsts[alike] = site
        return site

    def _likeness(self, owner: str, attribute: str) -> Hashable | None:
        """Returns what layers with equal sites have in common; None where a site depends on the layer's path, too."""
        regions = self.regions
        is_placed = regions.graphs or regions.example_inputs is not None or owner in regions.known or not owner
        if attribute != "weight" or is_placed or self._is_out_proj(owner):
            return None
        return likeness(self.modules[owner])

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

    def _new_site(self, owner: str, attribute: str, weight: torch.Tensor, held: str | None) -> Site:
        """Returns the site of a weight, found in graphs; its own module's if no graph has all of its uses."""
        region, uses, reason = self._region(owner, attribute)
        if held is not None and region not in self.regions.graphs:
            raise NoSiteError(
                f"its {attribute} is held by {held}, too, where no change of it is read; let the code read it from the "
                "module in each call"
            )
        if region is not None and uses is not None:
            reason = self._why_no_graph(region, owner, attribute, uses)
            if reason is None:
                return self._site(region, owner, attribute, weight, uses)
        if reason is None:
            raise NoSiteError(f"no operation that a rule adapts uses its {attribute}")
        if holds_own_tensor(self.modules[owner]):
            raise NoSiteError(
                f"{reason}; and its patched forward has a tensor of it in hand, which no change "
                "reaches; let it read the tensor from the module in each call"
            )
        self.templates[owner] = self.regions.present(owner) or own_code()
        return self._site(owner, owner, attribute, weight, _ITSELF)._replace(own_code=reason)

    def _region(self, owner: str, attribute: str) -> tuple[str | None, WeightUses | None, str | None]:
        """Returns the path of the smallest module whose graph uses a weight, and the graph's uses of the weight.

        If there is none, the third is the reason why modules that may use it have no graph; None if none may.
        """
        reasons = []
        for region in self._regions(owner):
            if region == owner and self._is_out_proj(owner):
                return None, None, "nn.MultiheadAttention reads its weight, and doesn't call it"
            if self.regions.template(region) is None:
                reasons.append(f"{region or 'the model'} can't become a graph: {self.regions.errors[region]}")
                continue
            uses = self.regions.uses(region, owner, attribute)
            if uses is not None:
                return region, uses, None
        return None, None, "; ".join(reasons) or None

    def _is_out_proj(self, owner: str) -> bool:
        around, _, name = owner.rpartition(".")
        return name == "out_proj" and isinstance(self.modules.get(around), nn.MultiheadAttention)

    def _why_no_graph(self, region: str, owner: str, attribute: str, uses: WeightUses) -> str | None:
        """Returns the reason why the graph of a region doesn't show all uses of a weight, or None."""
        if not uses.is_called_beside and (region == owner or not self._is_called_beside(region, owner, uses)):
            return None
        using = f"used in {', '.join(uses.others)}" if uses.others else "used in another way"
        reason = f"its {attribute} is {using}, and its module is called as well"
        if uses.shortens:
            raise NoSiteError(f"{reason}, which shortens its rows by max_norm")
        return reason

    def _site(self, region: str, owner: str, attribute: str, weight: torch.Tensor, uses: WeightUses) -> Site:
        if uses.is_unused:
            raise NoSiteError(f"no output depends on what is computed with its {attribute}")
        module, around = self.modules[owner], self.modules[region]
        cls = stands_for(module)
        kind = kind_of_layer(cls) if attribute == "weight" else None
        conflict = uses.bias_conflict
        if uses.bias is not None and not _is_parameter(around, uses.bias):
            conflict = f"its bias {uses.bias} is no parameter"
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
            is_called=uses.is_called,
            fixed=self._fixed_arguments(region),
            computed=computed_from(module, attribute),
            patched_forward=computes_otherwise(module) if self.templates[region].calls_set_forward else None,
        )

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


_ITSELF = WeightUses(ops.Weight, ((), ()), False, 1, False, (), False, False, None, None, False)
"""Stands for the uses of a weight where no graph shows them: whatever code reads it gets the changed one."""


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


def computes_otherwise(module: nn.Module) -> str | None:
    """Returns why a change of the weight may not be what an adapter adds beside a patched forward; None if it is."""
    forward = patched_forward(module)
    if forward is None:
        return None
    # torch.compile hides what it compiles
    compiled = getattr(forward, "_torchdynamo_orig_callable", forward)
    of_class = types.MethodType(in_place.original_class(module).forward, module)
    if compiled == of_class:
        return None
    try:
        own, other = (lift_forward(module, _of_one(each)).graphs for each in (of_class, compiled))
    except TraceError as error:
        return f"and no graph shows that it computes what the class of the layer does ({error})"
    if len(own) == len(other) == 1 and _same(own[0], other[0]):
        return None
    return "and computes something else than the class of the layer"


def _of_one(forward: Callable[..., Any]) -> Callable[[Any], Any]:
    def with_one_argument(x: Any) -> Any:
        return forward(x)

    return with_one_argument


def _same(graph: fx.Graph, other: fx.Graph) -> bool:
    return equivalent(graph, other, {}) and checks_all_of(graph, other, lambda _: False)


_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name)

_NOT_HELD = (frozenset(vars(nn.Module())) - {*_HOOKS}) | OF_HOOKS | {KNOWN}
"""Attributes of every module beside its hooks, such as parameters and submodules."""

_PLAIN_TYPES = PLAIN - {nn.Parameter}
"""Types whose values hold no parameter."""

_REGISTERED = 2
"""The references to a parameter that its module alone has, when they are counted: the module's, and the count's."""


class HeldParameters:
    """The parameters that the modules of one model hold in attributes, containers, closures and hooks."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._places: dict[int, str] | None = None

    def place_of(self, owner: nn.Module, name: str) -> str | None:
        """Returns where a module holds a parameter of `owner`, for a person; None if none does."""
        # the search takes its time, and there is nothing to find for nearly all weights
        if sys.getrefcount(owner._parameters.get(name)) <= _REGISTERED:
            return None
        if self._places is None:
            self._places = dict(self._found())
        return self._places.get(id(owner._parameters.get(name)))

    def _found(self) -> Iterator[tuple[int, str]]:
        for path, module in self._modules.items():
            if isinstance(module, nn.RNNBase):
                continue  # what it holds is read as its attributes are, see `adapters/reads.py`
            for name, value in vars(module).items():
                if name not in _NOT_HELD and type(value) not in _PLAIN_TYPES:
                    for parameter in _parameters_in(value):
                        yield id(parameter), f"self.{name} of {path or 'the model'}"
        for hooks in FORWARD_HOOKS_OF_ALL:
            for parameter in _parameters_in(dict(hooks)):
                yield id(parameter), "a hook of all modules"


def _parameters_in(start: Any) -> Iterator[nn.Parameter]:
    """Yields the parameters that a value leads to otherwise than by a module."""
    waiting, seen = [start], dict[int, Any]()
    while waiting:
        value = waiting.pop()
        kind = type(value)  # isinstance would read __class__, which a user's object may compute
        if issubclass(kind, nn.Parameter):
            yield value
        elif id(value) not in seen and not issubclass(kind, torch.Tensor | type | nn.Module):
            seen[id(value)] = value
            waiting += [part for part in opened(value)[1] if type(part) not in _PLAIN_TYPES]
