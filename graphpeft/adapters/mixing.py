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
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphpeft._torch import pytree
from graphpeft.adapters import adapter_names
from graphpeft.adapters.acting import forget_kept_forward
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.graphs import bare, names_of_others, op_in, with_adapter
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.present_rows import present, rows_if_any, rows_present
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.adapters.tensors import refuse_missing
from graphpeft.graph import in_place, stand_ins
from graphpeft.graph.paths import join, within
from graphpeft.graph.recomputing import taken_along
from graphpeft.graph.template import Graphs, Template, graph_forward, template_of, wear_template
from graphpeft.rules import rewrite
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.arguments import Asked
from graphpeft.rules.report import listed
from graphpeft.rules.rule import RunsByRow
from graphpeft.sites.finder import NoSiteError, SiteFinder
from graphpeft.sites.parts import is_view
from graphpeft.sites.readers import caller_of_other_methods
from graphpeft.sites.site import CallSite
from graphpeft.transaction import transaction

Runner = Callable[..., Any]
"""Runs a region on a mixed batch; its first argument is the module."""


_MOST_MIXTURES = 64
"""For how many sets of adapters it is remembered how regions run."""

_Where = tuple[str, str, str]
"""The region of a site, its weight's module, and the weight's name there."""


class RowAdapters:
    """Which adapter each row of a tensor has."""

    def __init__(self, names: tuple[str, ...], adapters: Adapters) -> None:
        self.names = names
        self._adapters = adapters
        self._attributes: dict[Any, list[str | None]] = {}
        self._numbers: dict[Any, torch.Tensor] = {}

    def stacked(self, owner: nn.Module, stem: str, where: _Where | None) -> torch.Tensor:
        """Returns the adapters' parameters `stem` of `owner`, one for each row.

        Smaller ones are filled up with zeros, and rows whose adapter has none there get zeros alone.

        Args:
            owner: The module.
            stem: Their name without those of the adapters.
            where: The site, if only adapters with this very one are meant.
        """
        parameters = owner._parameters
        tensors = [parameters.get(name) for name in self._of_rows(stem, where)]  # type: ignore[arg-type]
        there: list[torch.Tensor] = [tensor for tensor in tensors if tensor is not None]
        if len(there) == len(tensors) and all(tensor.shape == there[0].shape for tensor in there):
            return torch.stack(there)
        if not there:
            # those of any adapter will do for the shape, and all are of one adapter by their order
            [like, *_] = [tensor for name, tensor in parameters.items() if name.startswith(f"{stem}_")]
            assert like is not None
            return like.new_zeros(len(tensors), *like.shape)
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in there), strict=True)]
        nothing = there[0].new_zeros(shape)
        return torch.stack([nothing if tensor is None else _filled_up(tensor, shape) for tensor in tensors])

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the adapters' number `stem` of `owner`: one for all rows, or a tensor with one for each.

        Args:
            owner: The module.
            stem: The number's name without that of the adapter.
            missing: What it is where there is none; None if any value will do.
        """
        values = tuple([owner.__dict__.get(name, missing) for name in self._of_rows(stem, None)])  # type: ignore[arg-type]
        there = {value for value in values if value is not None}
        if len(there) == 1:
            return next(iter(there))
        if values not in self._numbers:
            self._numbers[values] = torch.tensor([0.0 if value is None else value for value in values])
        return self._numbers[values]

    def _of_rows(self, stem: str, where: _Where | None) -> list[str | None]:
        if (stem, where) not in self._attributes:
            are_there = {name: name != BASE and self._is_at(name, where) for name in set(self.names)}
            self._attributes[stem, where] = [f"{stem}_{name}" if are_there[name] else None for name in self.names]
        return self._attributes[stem, where]

    def _is_at(self, name: str, where: _Where | None) -> bool:
        return where is None or any(_place(site)[:3] == where for site in self._adapters.by_name[name].sites)

    def groups(self) -> dict[str, list[int]]:
        """Returns the rows of each adapter."""
        found: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(name, []).append(row)
        return found


def _filled_up(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    missing = [amount for size, have in zip(shape, tensor.shape, strict=True) for amount in (size - have, 0)]
    return torch.nn.functional.pad(tensor, missing[::-1])


class Rows:
    """The rows of the present call.

    Attributes:
        by_count: The adapters of rows, by the number of rows that a tensor may have.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        runners: Mapping[int, Runner],
        by_count: dict[int, RowAdapters],
        adapters: Adapters,
    ) -> None:
        self._names, self._runners, self.by_count, self._adapters = names, runners, by_count, adapters

    @property
    def runners(self) -> Mapping[int, Runner]:
        """How each region runs, by the id of its module.

        Raises:
            AdaptError: If an adapter was merged, or one of these deleted, since the call or its context began.
        """
        if self._adapters.merged:
            self._refuse(self._adapters.merged, "merged into the weights, which all rows share")
        gone = [name for name in self._names if name not in self._adapters.by_name]
        if gone:
            self._refuse(gone, "deleted")
        return self._runners

    def _refuse(self, names: Sequence[str], how: str) -> None:
        raise AdaptError(
            f"since this batch was given adapters by row, {listed(list(names))} were {how}; leave mixed_batch, and "
            "enter it anew"
        )

    @property
    def are_off(self) -> bool:
        """Whether the model's adapters were disabled since."""
        return self._adapters.are_off

    def of(self, tensor: torch.Tensor) -> RowAdapters:
        """Returns the adapters of the rows of `tensor`.

        Raises:
            ValueError: If it has another number of rows.
        """
        count = tensor.shape[0] if tensor.ndim else 0
        if count not in self.by_count:
            wanted = " or ".join(map(str, self.by_count))
            raise ValueError(
                f"adapter_names names {wanted} rows, and an adapted module is given a tensor of the shape "
                f"{tuple(tensor.shape)}; name one adapter for each row of the batch, which must be the first dimension "
                "there"
            )
        return self.by_count[count]


# the layer


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    rows = rows_if_any()
    runner = rows.runners.get(id(module)) if rows is not None else None
    if rows is not None and runner is not None and not rows.are_off:
        return runner(module, *args, **kwargs)
    # asked for in each call: other adapters may be active since
    forward = graph_forward(module) or in_place.original_class(module).forward
    return forward(module, *args, **kwargs)


def _layer() -> in_place.Layer:
    return _LAYER


def _itself(module: nn.Module) -> nn.Module:
    return module


_ITSELF = "_graphpeft_itself"
"""The attribute by which a graph, which can only read attributes, gets the module that owns it."""

_LAYER = in_place.Layer("rows", (), {"forward": _forward, _ITSELF: property(_itself)}, (_layer, ()))


# a call


def mixed(
    modules: Callable[[], Modules], adapters: Adapters, names: Sequence[str], repeats: int = 1
) -> contextlib.AbstractContextManager[None]:
    """Lets the calls in a context have these adapters, one for each row.

    Args:
        modules: Returns the model's modules by path.
        adapters: The model's adapters.
        names: The names, with ``"__base__"`` for none.
        repeats: How often each row may be repeated, as in a search with beams.

    Raises:
        TypeError: If `names` is a text.
        AdaptError: If a name isn't known, an adapter can't be mixed with others, or one is merged.
        ValueError: If there are none.
    """
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
    by_count = {len(names): RowAdapters(names, adapters)}
    if repeats > 1:
        by_count[len(names) * repeats] = RowAdapters(tuple(name for name in names for _ in range(repeats)), adapters)
    return taken_along(functools.partial(rows_present, Rows(wanted, runners, by_count, adapters)))


def _refuse_unknown(adapters: Adapters, names: tuple[str, ...]) -> None:
    unknown = adapter_names.unknown([name for name in names if name != BASE], adapters.by_name)
    if unknown is not None:
        raise AdaptError(f"{unknown}; it has {sorted(adapters.by_name)}, and {BASE!r}")


def _refuse_merged(adapters: Adapters) -> None:
    if adapters.merged:
        raise AdaptError(
            f"{listed(adapters.merged)} are merged into the weights, which all rows share; call unmerge_adapter() first"
        )


def _runners(modules: Callable[[], Modules], adapters: Adapters, names: tuple[str, ...]) -> Mapping[int, Runner]:
    """Returns how each region runs; what adapters at the same sites have in common is worked out once."""
    key = frozenset([_signature(adapters, name) for name in names]), tuple(adapters.acting), tuple(adapters.read)
    known: _Known | None = adapters.mixing.get(key)
    # other adapters act since, or somebody has edited a graph
    if known is None or any(template_of(module) is not template for module, template in known.worn):
        present = modules()
        with transaction(present[""]):
            known = adapters.mixing[key] = _made_runners(present, adapters, names)
        if len(adapters.mixing) > _MOST_MIXTURES:
            adapters.mixing.pop(next(iter(adapters.mixing)), None)
    return known.runners


class _Known(NamedTuple):
    """How each region runs, and the graphs that the regions wore when that was made.

    These keep the modules, too, so that no other has the id of one.
    """

    runners: Mapping[int, Runner]
    worn: list[tuple[nn.Module, Template | None]]


def _signature(adapters: Adapters, name: str) -> int:
    """Returns a number that is the same for adapters with equal rules at the same sites."""
    known = adapters.signatures
    if name not in known:
        adapter = adapters.by_name[name]
        _refuse_adapter(adapter, name)
        sites = tuple((_place(adapted), adapted.rule) for adapted in adapter.sites), *_reads(adapter).items()
        # comparing hundreds of sites in each call would take its time
        known[name] = known.setdefault(sites, len(known))
    return known[name]


def _refuse_adapter(adapter: Adapter, name: str) -> None:
    if any(isinstance(adapted.site, CallSite) for adapted in adapter.sites):
        raise AdaptError(
            f"adapter {name!r} changes what modules are given, not weights, so it can't be one of several in a batch; "
            "activate it with set_adapter, for all rows"
        )


def _reads(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Returns the names of the tensors that are others, or have other rows, for an adapter, by their module's path."""
    return adapter.stand_ins | {path: (*adapter.stand_ins.get(path, ()), "weight") for path in adapter.rows}


def _place(adapted: AdaptedSite) -> tuple[Any, ...]:
    site: Any = adapted.site
    return site.region, site.owner, site.attribute, site.op, site.nodes


def _made_runners(modules: Modules, adapters: Adapters, names: tuple[str, ...]) -> _Known:
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
    regions = _regions_of_weights(by_region)
    runners: dict[int, Runner] = {}
    for region, by_name in by_region.items():
        plain = bare(adapters, region, modules)
        at_once = _at_once(plain, modules[region], region, by_name, regions) if region not in reading else None
        if isinstance(at_once, Template):
            runners[id(modules[region])] = at_once.forward_for(names_of_others(modules[region], adapters))
        else:
            runners[id(modules[region])] = _in_turn(plain, modules[region], region, adapters, region in reading)
    for region in by_region:
        _let_ask(modules, adapters, region)
    return _Known(runners, [(modules[region], template_of(modules[region])) for region in by_region])


def _refuse_read_elsewhere(modules: Modules, adapters: Adapters, reading: Mapping[str, Collection[str]]) -> None:
    """Raises AdaptError unless the tensors of these names are read by the forwards of their modules alone."""
    finder = SiteFinder(modules[""], adapters.lifted) if reading else None
    for path, names in reading.items():
        assert finder is not None
        reason = _read_elsewhere(finder, path, names)
        if reason is not None:
            raise AdaptError(
                f"an adapter has tensors or rows in the place of those of {path or 'the model'}, and rows of a batch "
                f"can differ only in those of a layer that is called by itself: {reason}; activate that adapter with "
                "set_adapter, for all rows"
            )
        if template_of(modules[path]) is None:
            # once it asks for rows, its forward can't be recorded any more
            adapters.lifted.setdefault(path, finder.templates[path])


def _read_elsewhere(finder: SiteFinder, path: str, names: Collection[str]) -> str | None:
    """Returns the reason why the graph of a module may not be all that reads these tensors of it, or None."""
    if finder.modules[path]._parameters.get("weight") is None:
        return "it has no weight"
    try:
        region = finder.find(path, "weight").region
        readers = [region, *(reader for name in sorted(names) for reader in finder.readers(path, name))]
    except NoSiteError as error:
        return str(error)
    for reader in readers:
        if reader != path:
            return f"{reader or 'the model'} reads its tensors"
    caller = caller_of_other_methods(finder.modules, path, names)
    if caller is not None:
        return f"{caller or 'the model'} calls a method of it other than its forward"
    return "its forward can't become a graph" if finder.templates[path].calls_own_forward else None


def _let_ask(modules: Modules, adapters: Adapters, region: str) -> None:
    """Lets a region ask for the rows of the present call."""
    if region not in adapters.mixable:
        forget_kept_forward(modules[region], region)
    adapters.mixable.add(region)
    in_place.put_on(modules[region], _LAYER)


def run_at_once(modules: Modules, adapters: Adapters, name: str) -> None:
    """Lets each region of an adapter always run all rows at once, those that are present.

    Args:
        modules: The model's modules by path.
        adapters: Its adapters.
        name: The adapter, or one of several with equal rules at the same sites.

    Raises:
        AdaptError: If rows can't differ in the adapter, or a region could only run the rows of each adapter in turn.
    """
    _refuse_adapter(adapters.by_name[name], name)
    if _reads(adapters.by_name[name]):
        raise AdaptError(
            f"{listed(list(_reads(adapters.by_name[name])))} have tensors of their own for {name!r}, with which rows "
            "run in turn; only what adapters add can differ in rows that run at once"
        )
    by_region: dict[str, dict[str, list[AdaptedSite]]] = {}
    for adapted in adapters.by_name[name].sites:
        by_region.setdefault(adapted.site.region, {}).setdefault(name, []).append(adapted)
    regions = _regions_of_weights(by_region)
    found: dict[str, Template] = {}
    for region, by_name in by_region.items():
        at_once = _at_once(bare(adapters, region, modules), modules[region], region, by_name, regions)
        if isinstance(at_once, str):
            raise AdaptError(f"rows of a batch run in turn in {region or 'the model'}: {at_once}")
        found[region] = at_once
    for region, template in found.items():
        wear_template(modules[region], template)
        _let_ask(modules, adapters, region)


# all rows at once


def _at_once(
    plain: Template,
    module: nn.Module,
    region: str,
    by_name: Mapping[str, list[AdaptedSite]],
    regions: Mapping[tuple[str, str], set[str]],
) -> Template | str:
    """Returns the graph that runs all rows at once in a region, or the reason why there is none."""
    joined = _joined_sites(by_name)
    if joined is None:
        rules = {type(adapted.rule).__name__ for sites in by_name.values() for adapted in sites}
        return f"{listed(sorted(rules))} has no by_row for what the adapters do there"
    if _rearranges(plain, module, region, joined):
        return "an operation reads another view of a tensor, whose first dimension may not be the batch"
    return _by_row(plain, module, region, joined, regions)


def _joined_sites(by_name: Mapping[str, list[AdaptedSite]]) -> list[tuple[AdaptedSite, Any]] | None:
    """Returns each site with the rule for all adapters there, or None if there isn't one for each."""
    at_weight: dict[tuple[str, str], list[AdaptedSite]] = {}
    for sites in by_name.values():
        for adapted in sites:
            at_weight.setdefault((adapted.site.owner, adapted.site.prefix), []).append(adapted)
    found = [(sites[0], _joined(sites)) for sites in at_weight.values()]
    return None if any(rule is None for _, rule in found) else found


def _rearranges(plain: Template, module: nn.Module, region: str, sites: list[tuple[AdaptedSite, Any]]) -> bool:
    """Tells whether an operation's input is another view of a tensor, whose first dimension may not be the batch."""
    for index, graph in enumerate(plain.graphs):
        named = {node.name: node for node in graph.nodes}
        for adapted, _ in sites:
            site: Any = adapted.site
            for node in site.nodes[index]:
                op: Any = op_in(graph, named, node, site.op, module, region)
                if is_view(op.x):
                    return True
    return False


def _joined(sites: Sequence[AdaptedSite]) -> Any:
    first = sites[0].rule
    if not isinstance(first, RunsByRow) or any(_place(adapted) != _place(sites[0]) for adapted in sites):
        return None
    rule = first.joined([adapted.rule for adapted in sites])
    if rule is None:
        return None
    asked = Asked(rule.by_row)
    return rule if all(asked.may_be(name) for adapted in sites for name in adapted.specs) else None


def _regions_of_weights(by_region: Mapping[str, Mapping[str, list[AdaptedSite]]]) -> dict[tuple[str, str], set[str]]:
    """Returns the regions of each weight: an adapter that came when a module around was a graph has its site there."""
    found: dict[tuple[str, str], set[str]] = {}
    for region, by_name in by_region.items():
        for adapted in itertools.chain(*by_name.values()):
            found.setdefault(_place(adapted)[1:3], set()).add(region)
    return found


def _by_row(
    plain: Template,
    module: nn.Module,
    region: str,
    sites: list[tuple[AdaptedSite, Any]],
    regions: Mapping[tuple[str, str], set[str]],
) -> Template:
    edits = tuple(
        (
            within(adapted.site.owner, region) or _ITSELF,
            adapted.site.prefix,
            adapted.site.op,
            adapted.site.nodes,
            rule,
            tuple(adapted.specs),
            tuple(rule.constants_by_row.items()),
            # only where it is needed, since it tells regions apart that could share a template
            _place(adapted)[:3] if len(regions[_place(adapted)[1:3]]) > 1 else None,
        )
        for adapted, rule in sites
    )

    def edit(graphs: Graphs) -> None:
        for index, graph in enumerate(graphs):
            named = {node.name: node for node in graph.nodes}
            for owner, prefix, kind, nodes, rule, parameters, constants, where in edits:
                for node in nodes[index]:
                    op: Any = op_in(graph, named, node, kind, module, region)
                    values = _values_by_row(graph, op, owner, prefix, parameters, constants, where)
                    training = "training" if owner == _ITSELF else join(owner, "training")
                    rewrite.replace(graph, op, rule.by_row, values, {"training": training})

    return plain.derive(("by row", edits), edit)


def _values_by_row(
    graph: fx.Graph,
    op: Any,
    owner: str,
    prefix: str,
    parameters: Sequence[str],
    constants: Sequence[tuple[str, float | None]],
    where: _Where | None,
) -> dict[str, fx.Node]:
    """Emits the reading of the adapters' parameters and numbers, for the rows of the operation's input."""
    with graph.inserting_before(op.node):
        rows = graph.call_function(_rows_of, (op.x,))
        holder = graph.create_node("get_attr", owner)
        values = {name: graph.call_method("stacked", (rows, holder, prefix + name, where)) for name in parameters}
        return values | {
            name: graph.call_method("number", (rows, holder, prefix + name, missing)) for name, missing in constants
        }


def _rows_of(x: torch.Tensor) -> RowAdapters:
    return present().of(x)


# one adapter after the other


def _in_turn(plain: Template, module: nn.Module, region: str, adapters: Adapters, has_others: bool) -> Runner:
    """Returns a function that runs the graph of each adapter on its own rows.

    Args:
        plain: The graph without any of them.
        module: The module.
        region: Its path.
        adapters: The model's adapters.
        has_others: Whether the module has other tensors for some of them.
    """
    others = names_of_others(module, adapters)

    def forward_with(name: str) -> Callable[..., Any]:
        content = adapters.by_name.get(name)
        sites = [adapted for adapted in content.sites if adapted.site.region == region] if content is not None else []
        if content is None or not sites:
            return plain.forward_for(others)
        slot = next(slot for slot in itertools.count() if slot not in plain.slots)
        template = with_adapter(plain, module, slot, content.config.method, region, sites)
        return template.forward_for({**others, slot: name})

    forward_with = functools.cache(forward_with)

    @functools.cache
    def reading_of(name: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
        content = adapters.by_name.get(name)
        return content.reading(region, name) if content is not None else lambda _: {}

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or any(tensor.shape[:1] != tensors[0].shape[:1] for tensor in tensors):
            raise ValueError(
                f"{region or 'the model'} is given tensors of the shapes {[tuple(t.shape) for t in tensors]}, of which "
                "it isn't known which are rows of the batch; call it for one adapter at a time"
            )
        groups = present().of(tensors[0]).groups()
        results = []
        for name, rows in groups.items():
            index = torch.tensor(rows, device=tensors[0].device)
            # what is one tensor stays one: an attention asks whether its key is its query
            taken = {id(tensor): tensor[index] for tensor in tensors}
            given = [taken[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = pytree.tree_unflatten(given, structure)
            # regions inside have the same adapter for all of these rows
            own = Rows((), present().runners, {len(rows): RowAdapters((name,) * len(rows), adapters)}, adapters)
            with taken_along(functools.partial(rows_present, own)):
                owner = stand_ins.with_tensors(module, reading_of(name)(module)) if has_others else module
                results.append(forward_with(name)(owner, *own_args, **own_kwargs))
        return _together(results, list(groups.values()), region)

    return run


def _together(results: list[Any], groups: list[list[int]], region: str) -> Any:
    """Puts the rows of several results into one, in their order in the batch."""
    order = torch.tensor([row for rows in groups for row in rows]).argsort()

    def gather(*parts: Any) -> Any:
        if not isinstance(parts[0], torch.Tensor):
            return parts[0]
        for part, rows in zip(parts, groups, strict=True):
            if part.shape[:1] != (len(rows),):
                raise ValueError(
                    f"{region or 'the model'} returns a tensor of the shape {tuple(part.shape)} for {len(rows)} rows, "
                    "which can't be put together; call it for one adapter at a time"
                )
        return torch.cat(parts)[order.to(parts[0].device)]

    return pytree.tree_map(gather, results[0], *results[1:])
