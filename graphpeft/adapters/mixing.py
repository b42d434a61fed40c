"""A batch whose rows have different adapters: ``model(x, adapter_names=["a", "b", "__base__"])``.

Each region with adapters gets a layer whose forward asks for the `Rows` of the present call. Without any it runs what
it ran before. With them it runs a graph in which a rule's `by_row` works on the adapters' parameters, stacked row by
row; where a rule has none, or a module has other tensors for an adapter, it runs the graphs of the adapters in turn on
their rows.

The rows are no argument of the modules, which hand on only what they know, but belong to the context of the call (see
`present_rows`). A checkpointed function that runs again in the backward takes them along.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft._torch import pytree, without_compiler
from graphpeft.adapters import adapter_names
from graphpeft.adapters.acting import refuse_newly_patched
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.at_once import ITSELF, at_once, itself, regions_of_weights
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.graphs import bare, names_of_others
from graphpeft.adapters.in_turn import in_turn
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.present_rows import ROWS
from graphpeft.adapters.reads import let_ask
from graphpeft.adapters.rows import RowAdapters, Rows, Runner, place_of
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.graph import in_place
from graphpeft.graph.hosts.around_patched import own_forward
from graphpeft.graph.recomputing import taken_along
from graphpeft.graph.template import OWN_FORWARD, SET_FORWARD, Template, graph_forward, template_of, wear_template
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.sites.finder import Known, SiteFinder
from graphpeft.sites.regions import Lifted
from graphpeft.sites.site import CallSite, NoSiteError
from graphpeft.transaction import set_item, transaction
from graphpeft.wording import joined, number_of

_MOST_MIXTURES = 64
"""For how many sets of adapters it is remembered how regions run."""


# the layer


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    rows = ROWS.get()
    runner = rows.runner_of(module) if rows is not None else None
    if runner is not None:
        return runner(module, *args, **kwargs)
    # asked for in each call: other adapters may be active since
    forward = graph_forward(module)
    return own_forward(module)(*args, **kwargs) if forward is None else forward(module, *args, **kwargs)


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Returns the forward that a module would have without the layers around these, as a function of it."""
    own = getattr(type(module), _FORWARD, None) or graph_forward(module)
    # of the class that was adapted, though another may derive from that
    return own or type(module)._graphpeft_original.forward  # pyright: ignore[reportAttributeAccessIssue]


def _layer() -> in_place.Layer:
    return _LAYER


_FORWARD = "_graphpeft_rows_forward"
_NAMESPACE = {"forward": _forward, _FORWARD: _forward, ITSELF: property(itself)}
# a graph reads these of a module, also where it wears none and another adapter's runs for some rows
_NAMESPACE |= dict.fromkeys((OWN_FORWARD, SET_FORWARD), property(own_forward))
_LAYER = in_place.Layer("rows", (), _NAMESPACE, (_layer, ()))


# a call


def mixed(
    modules: Callable[[], Modules], adapters: Adapters, names: Sequence[str], repeats: int = 1
) -> contextlib.AbstractContextManager[None]:
    """Lets the calls in a context have these adapters, one for each row."""
    if isinstance(names, str):
        raise TypeError(f"adapter_names is the text {names!r}; pass a list of names, one for each row")
    names = tuple(names)
    if not names:
        raise ValueError("adapter_names is empty; name one adapter for each row of the batch")
    _refuse_unknown(adapters, names)
    if adapters.are_off:
        return contextlib.nullcontext()
    _refuse_merged(adapters)
    wanted = tuple(name for name in dict.fromkeys(names) if name != BASE)
    runners = _runners(modules, adapters, wanted)
    by_count = {len(names): RowAdapters(names, wanted, adapters)}
    if repeats > 1:
        repeated = tuple(name for name in names for _ in range(repeats))
        by_count[len(repeated)] = RowAdapters(repeated, wanted, adapters)
    return taken_along(functools.partial(ROWS.during, Rows(wanted, runners, by_count, adapters, modules)))


def refuse_other_rows(names: Sequence[str], inputs: Any) -> None:
    """Raises ValueError if no tensor that a model is given has as many rows as there are names.

    Where some row has an adapter, its regions count the rows that they are given.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if shapes and not any(shape[:1] == (len(names),) for shape in shapes):
        raise ValueError(
            f"adapter_names names {number_of(len(names), 'row')}, and the model is given tensors of the shapes "
            f"{shapes}; name one adapter for each row"
        )


def _refuse_unknown(adapters: Adapters, names: tuple[str, ...]) -> None:
    unknown = adapter_names.unknown([name for name in names if name != BASE], adapters.by_name)
    if unknown is not None:
        raise AdaptError(f"{unknown}; the model has {sorted(adapters.by_name)}, and {BASE!r}")


def _refuse_merged(adapters: Adapters) -> None:
    if adapters.merged:
        raise AdaptError(
            f"{joined(adapters.merged)} are merged into the weights, which all rows share; call unmerge_adapter() first"
        )


def _runners(modules: Callable[[], Modules], adapters: Adapters, names: tuple[str, ...]) -> Mapping[int, Runner]:
    """Returns how each region runs; what adapters at the same sites have in common is worked out once."""
    known: _Known | None = adapters.mixing.get(_key(adapters, names))
    if known is None or not _is_current(known):
        known = _made_runners(modules, adapters, names)
    return known.runners


class _Known(NamedTuple):
    """How each region runs, and for what model that was worked out.

    The modules are kept, so that no other has the id of one.

    Attributes:
        runners: How each region runs, by the id of its module.
        links: The modules on the way to the regions, each with its name in the module around it.
        worn: The regions, with the graphs that they wore.
    """

    runners: Mapping[int, Runner]
    links: list[tuple[nn.Module, str, nn.Module]]
    worn: list[tuple[nn.Module, Template | None]]


def _is_current(known: _Known) -> bool:
    """Returns whether a model still has the modules and the graphs for which it was worked out how regions run."""
    exchanged = [name for around, name, module in known.links if around._modules.get(name) is not module]
    # other adapters act since, or somebody has edited a graph
    others = [module for module, template in known.worn if template_of(module) is not template]
    return not exchanged and not others


def _links(modules: Modules, regions: Iterable[str]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Returns the modules on the way to some regions, each with its name in the module around it."""
    found: dict[str, tuple[nn.Module, str, nn.Module]] = {}
    for region in regions:
        path = region
        while path and path not in found:
            around, _, name = path.rpartition(".")
            found[path] = modules[around], name, modules[path]
            path = around
    return list(found.values())


def _key(adapters: Adapters, names: tuple[str, ...]) -> object:
    """Returns what decides how regions run; None if it was never worked out for one of the adapters."""
    signatures = [adapters.signatures.get(name) for name in names]
    return None if None in signatures else (frozenset(signatures), tuple(adapters.acting), tuple(adapters.read))


def _sign(adapters: Adapters, name: str) -> None:
    """Gives an adapter an object that is the same one for adapters with equal rules at the same sites."""
    known = adapters.signatures
    if name not in known:
        adapter = adapters.by_name[name]
        _refuse_adapter(adapter, name)
        sites = tuple((place_of(adapted), adapted.rule) for adapted in adapter.sites), *_reads(adapter).items()
        # comparing hundreds of sites in each call would take its time
        known[name] = known.setdefault(sites, object())


def _refuse_adapter(adapter: Adapter, name: str) -> None:
    if any(adapted.rule.reads_whole_batch for adapted in adapter.sites):
        raise AdaptError(
            f"adapter {name!r} is of {adapter.config.method}, where each row's result depends on all rows of its "
            "batch, so it can't be one of several in a batch; activate it with set_adapter, for all rows"
        )
    rules = [adapted.rule for adapted in adapter.sites if not adapted.rule.call_inputs_by_row]
    given = [read for rule in rules for read in rule.call_inputs]
    if given:
        raise AdaptError(
            f"adapter {name!r} reads {joined(list(dict.fromkeys(given)))} of a whole batch, so it can't be one of "
            "several in a batch; activate it with set_adapter, for all rows"
        )
    if any(isinstance(adapted.site, CallSite) for adapted in adapter.sites):
        raise AdaptError(
            f"adapter {name!r} changes what modules are given or return, not weights, so it can't be one of several in "
            "a batch; activate it with set_adapter, for all rows"
        )


def _reads(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Returns the names of the tensors that are others, or have other rows, for an adapter, by their module's path."""
    return adapter.overrides | {path: (*adapter.overrides.get(path, ()), "weight") for path in adapter.rows}


@without_compiler("how a mixture of adapters runs is worked out once, before its graphs run")
def _made_runners(all_modules: Callable[[], Modules], adapters: Adapters, names: tuple[str, ...]) -> _Known:
    """Works out how regions run, and remembers it."""
    modules = all_modules()
    # under the model's lock, since another thread may switch adapters
    with transaction(modules[""]):
        for name in names:
            _sign(adapters, name)
        by_region: dict[str, dict[str, list[AdaptedSite]]] = {}
        for name in names:
            refuse_missing(modules, adapters.by_name[name], name)
            for adapted in adapters.by_name[name].sites:
                by_region.setdefault(adapted.site.region, {}).setdefault(name, []).append(adapted)
        for name in adapters.acting:
            # where it acts and no row has an adapter, all rows have the base
            for adapted in adapters.by_name[name].sites:
                if adapted.site.region in modules:
                    by_region.setdefault(adapted.site.region, {})
        reading: dict[str, set[str]] = {}
        for name in (*names, *adapters.read):
            for path, own in _reads(adapters.by_name[name]).items():
                reading.setdefault(path, set()).update(own)
        _refuse_read_elsewhere(modules, adapters, reading)
        by_region |= {path: {} for path in reading if path not in by_region}
        _refuse_rows_elsewhere(modules, by_region)
        regions = regions_of_weights(by_region)
        runners: dict[int, Runner] = {}
        slots = adapters.slots_by_module()
        for region, by_name in by_region.items():
            plain, others = bare(adapters, region, modules), names_of_others(modules[region], slots.get(region, ()))
            graph = at_once(plain, modules[region], region, by_name, regions) if region not in reading else None
            if isinstance(graph, Template):
                runners[id(modules[region])] = graph.forward_for(others)
            else:
                runners[id(modules[region])] = in_turn(
                    plain, modules[region], region, adapters, others, region in reading
                )
        for region in by_region:
            _let_ask(modules, adapters, region)
        _let_reads_ask(modules, adapters, names, reading)
        worn = [(modules[region], template_of(modules[region])) for region in by_region]
        known = adapters.mixing[_key(adapters, names)] = _Known(runners, _links(modules, by_region), worn)
        if len(adapters.mixing) > _MOST_MIXTURES:
            del adapters.mixing[next(iter(adapters.mixing))]
        return known


def _refuse_rows_elsewhere(modules: Modules, regions: Iterable[str]) -> None:
    """Raises AdaptError if the batch isn't the first dimension of a region's inputs, by an option of its module."""
    for region in regions:
        around = region
        while True:
            module: Any = modules[around]
            own = getattr(module, "self_attn", module) if isinstance(module, _LAYERS_OF_TRANSFORMERS) else module
            if isinstance(own, _WITH_LAYOUT) and not own.batch_first:
                raise AdaptError(
                    f"{around or 'the model'} is built with batch_first=False, and adapters of rows are chosen by the "
                    "first dimension of what a module is given; build it with batch_first=True"
                )
            if not around:
                break
            around = around.rpartition(".")[0]


_WITH_LAYOUT = (nn.MultiheadAttention, nn.RNNBase)
_LAYERS_OF_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""PyTorch's classes of modules that say whether the batch comes first: themselves, or by their attention."""


def _refuse_read_elsewhere(modules: Modules, adapters: Adapters, reading: Collection[str]) -> None:
    """Raises AdaptError unless the forwards of these modules alone read the tensors that differ from row to row."""
    finder = SiteFinder(modules[""], Known(adapters.lifted, adapters.found)) if reading else None
    for path in reading:
        assert finder is not None
        reason = _read_elsewhere(finder, path)
        if reason is not None:
            raise AdaptError(
                f"an adapter has tensors or rows in the place of those of {path or 'the model'}, and rows of a batch "
                f"can differ only in those of a layer that is called by itself: {reason}; activate that adapter with "
                "set_adapter, for all rows"
            )
        if template_of(modules[path]) is None:
            # once it asks for rows, its forward can't be recorded any more
            lifted = Lifted(finder.templates[path], modules[path], in_place.original_class(modules[path]))
            set_item(adapters.lifted, path, lifted)


def _read_elsewhere(finder: SiteFinder, path: str) -> str | None:
    """Returns the reason why the graph of a module may not be all that reads these tensors of it, or None."""
    if finder.modules[path]._parameters.get("weight") is None:
        return "it has no weight"
    try:
        site = finder.find(path, "weight")
    except NoSiteError as error:
        return str(error)
    if site.region != path:
        return f"{site.region or 'the model'} reads its tensors"
    return None if site.own_code is None else "its forward can't become a graph"


def _let_ask(modules: Modules, adapters: Adapters, region: str) -> None:
    """Lets a region ask for the rows of the present call."""
    if region not in adapters.mixable:
        refuse_newly_patched(modules[region], region)
    adapters.mixable.add(region)
    in_place.put_on(modules[region], _LAYER)


def _let_reads_ask(
    modules: Modules, adapters: Adapters, names: Iterable[str], reading: Mapping[str, Collection[str]]
) -> None:
    """Lets whoever reads what differs from row to row ask for the rows of the present call."""
    asked = {path: {*own} for path, own in reading.items()}
    for name in names:
        for adapted in adapters.by_name[name].weight_sites:
            if not adapted.site.is_called:
                asked.setdefault(adapted.site.owner, set()).update(adapted.changed)
    let_ask(modules, adapters, {path: sorted(own) for path, own in asked.items()})


def run_at_once(modules: Modules, adapters: Adapters, name: str) -> None:
    """Lets each region of an adapter always run all rows at once, those that are present."""
    _refuse_adapter(adapters.by_name[name], name)
    if _reads(adapters.by_name[name]):
        raise AdaptError(
            f"{joined(list(_reads(adapters.by_name[name])))} have tensors of their own for {name!r}, with which rows "
            "run in turn; only what adapters add can differ in rows that run at once"
        )
    by_region: dict[str, dict[str, list[AdaptedSite]]] = {}
    for adapted in adapters.by_name[name].sites:
        by_region.setdefault(adapted.site.region, {}).setdefault(name, []).append(adapted)
    regions = regions_of_weights(by_region)
    found: dict[str, Template] = {}
    for region, by_name in by_region.items():
        graph = at_once(bare(adapters, region, modules), modules[region], region, by_name, regions)
        if isinstance(graph, str):
            raise AdaptError(f"rows of a batch run in turn in {region or 'the model'}: {graph}")
        found[region] = graph
    for region, template in found.items():
        wear_template(modules[region], template)
        _let_ask(modules, adapters, region)
