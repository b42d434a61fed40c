"""Adds the changes of adapters to the weights, for good or until they are taken out again, bit for bit.

All functions here that change something run inside a transaction, for which each tensor is remembered before it is
written, so that a failure at any weight leaves all of them as they were.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from graphpeft.adapters import merged_codes, merged_weights
from graphpeft.adapters.acting import let_act, override_readers
from graphpeft.adapters.changes import (
    add_change,
    asks_of_weights,
    bias_of,
    bias_place,
    changed_places,
    changing_sites,
    delta,
    lies_in,
    memory_of,
    share_memory,
    there_to_write,
)
from graphpeft.adapters.empty_tensors import refuse_empty
from graphpeft.adapters.exchanged import refuse_exchanged_classes, refuse_missing, resized
from graphpeft.adapters.graphs import worn_in
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Adapters, Modules, Tensors
from graphpeft.dry_runs import alone
from graphpeft.graph import overrides
from graphpeft.graph.autocast import in_own_precision
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.hosts.sharding import reshard, whole
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join
from graphpeft.graph.template import refuse_other_options, template_of
from graphpeft.graph.values import loaded, written
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.options import Role
from graphpeft.sites import quantisers
from graphpeft.sites.site import LeafSite, Site
from graphpeft.transaction import remember, set_attribute, set_item
from graphpeft.wording import joined


def merge(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Adds the changes of adapters to the weights, and writes their overrides over the tensors themselves.

    Quantised weights stay as they are, see `merged_codes`.
    """
    refuse_exchanged_classes(modules, adapters)
    reshard(modules.values())
    merged = list(dict.fromkeys(names))
    _refuse_merging(modules, adapters, merged)
    rest = _beside_those_in_the_weights(modules, adapters, merged)
    bases: Tensors = {}
    if rest == merged:
        _take_out(modules, adapters)
    else:
        bases = _present(modules, adapters, _read_as_base(adapters, rest))
        _forget(modules, adapters)
    with torch.no_grad():
        # these first, since they are what the changes are changes of
        for name in merged:
            for path, own_names in adapters.by_name[name].overrides.items():
                with written(modules[path]):
                    for own, other in overrides.own_and_override(modules[path], own_names, name):
                        remember(own)
                        own.copy_(whole(other))
            for path, rows in adapters.by_name[name].rows.items():
                values = whole(own_parameter(modules[path], overrides.rows(name)))
                with written(modules[path]):
                    table = own_parameter(modules[path], "weight")
                    remember(table)
                    table.copy_(overrides.put_rows(table, rows.indices, values))
        for sites in _by_weight(modules, adapters, rest).values():
            _merge_into_weight(sites, modules, bases)
    for adapter in adapters.by_name.values():
        set_attribute(adapter, "overwritten", {})  # what was merged into is kept


def _beside_those_in_the_weights(modules: Modules, adapters: Adapters, names: list[str]) -> list[str]:
    """Returns the adapters that are to be merged beside those that are in the weights and may stay there; or all."""
    count = len(adapters.merged)
    may_stay = names[:count] == adapters.merged and not adapters.codes
    # what is written over a weight would be written over the change that is in it
    may_stay = may_stay and adapters.originals.keys().isdisjoint(_overwritten(adapters, names[count:]))
    return names[count:] if may_stay and merged_weights.are_as_merged(modules, adapters) else names


def _overwritten(adapters: Adapters, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the places of the tensors that adapters have others for, or rows of."""
    for name in names:
        adapter = adapters.by_name[name]
        yield from ((path, own) for path, own_names in adapter.overrides.items() for own in own_names)
        yield from ((path, "weight") for path in adapter.rows)


def _read_as_base(adapters: Adapters, names: list[str]) -> list[tuple[str, str]]:
    """Returns the places that are merged into, and whose values without any adapter the changes of others need."""
    read = [
        (adapted.site.owner, adapted.site.attribute)
        for name in names
        for adapted in adapters.by_name[name].weight_sites
        if "base" in asks_of_weights(adapted.rule)
    ]
    return [place for place in read if place in adapters.originals]


def merge_in_place(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Adds the changes of adapters to the weights until `unmerge`; nodes of theirs leave the graphs.

    Overrides and rows are read as before: what is trained as it is needs no merging.
    """
    if adapters.are_off:
        raise AdaptError(
            "the adapters are disabled, and merged ones would act; leave disable_adapter(), or call enable_adapters(), "
            "before you merge them"
        )
    reshard(modules.values())
    given = list(names)
    # in the order in which they act
    names = [name for name in adapters.active if name in given]
    names += [name for name in given if name not in names]
    _refuse_merging(modules, adapters, names)
    _refuse_unread(modules, adapters, names)
    merged_weights.keep_changes(modules, adapters)
    for name in names:
        for path, attribute in changed_places(modules, adapters.by_name[name]):
            if (path, attribute) not in adapters.originals:
                # a difference wouldn't do: adding and subtracting it doesn't give the same bits
                with loaded(modules[path], attribute):
                    original = own_parameter(modules[path], attribute).detach().clone()
                set_item(adapters.originals, (path, attribute), original)
        _add_to_weights(modules, adapters.by_name[name], adapters.originals)
        set_attribute(adapters, "merged", [*adapters.merged, name])
    merged_codes.keep(modules, adapters, names)
    merged_codes.merge(modules, adapters, adapters.merged)
    merged_weights.guard(modules, adapters)
    let_act(modules, adapters, list(adapters.read))


def unmerge(modules: Modules, adapters: Adapters) -> None:
    """Gives all weights the values that they had before `merge_in_place`, bit for bit."""
    if not adapters.merged:
        return
    refuse_exchanged_classes(modules, adapters)
    _take_out(modules, adapters)
    let_act(modules, adapters, list(adapters.read))


def _take_out(modules: Modules, adapters: Adapters) -> None:
    merged_weights.refuse_tied(modules, adapters)
    reshard(modules.values())
    _restore(modules, _present(modules, adapters, adapters.originals))
    merged_codes.put(modules, adapters.codes)
    _forget(modules, adapters)


def _forget(modules: Modules, adapters: Adapters) -> None:
    """Makes the present weights the model's own, with all that is merged into them."""
    merged_weights.release(modules, adapters)
    set_attribute(adapters, "merged", [])
    set_attribute(adapters, "originals", {})
    set_attribute(adapters, "codes", {})


def _present(modules: Modules, adapters: Adapters, places: Iterable[tuple[str, str]]) -> Tensors:
    """Returns the weights at some places as they are without merged adapters."""
    present = merged_weights.WithoutMerged(modules, adapters)
    return {place: present.at(*place)[0] for place in places if place[0] in modules}


@torch.no_grad()
def _restore(modules: Modules, originals: Tensors) -> None:
    for (path, name), original in originals.items():
        if path in modules:
            with written(modules[path]):
                weight = own_parameter(modules[path], name)
                remember(weight)
                weight.copy_(original)


@torch.no_grad()
def _add_to_weights(modules: Modules, adapter: Adapter, originals: Tensors) -> None:
    for adapted in changing_sites(modules, adapter):
        base = originals[adapted.site.owner, adapted.site.attribute]
        with there_to_write(adapted, modules):
            weight = own_parameter(modules[adapted.site.owner], adapted.site.attribute)
            bias = None if bias_of(adapted, modules) is None else originals.get(bias_place(adapted))
            add_change(adapted, modules, weight, base, bias)


def _merge_into_weight(sites: list[AdaptedSite], modules: Modules, bases: Tensors) -> None:
    """Adds the changes of one weight, and of the bias beside it; `bases` has it as it was before other changes."""
    site = sites[0].site
    assert isinstance(site, Site)
    with there_to_write(sites[0], modules):
        weight = own_parameter(modules[site.owner], site.attribute)
        base, bias = weight, bias_of(sites[0], modules)
        if len(sites) > 1:
            base, bias = weight.clone(), None if bias is None else bias.clone()
        base = bases.get((site.owner, site.attribute), base)
        for adapted in sites:
            add_change(adapted, modules, weight, base, bias)


def _by_weight(modules: Modules, adapters: Adapters, names: list[str]) -> dict[str, list[AdaptedSite]]:
    """Groups the sites of adapters by their weight."""
    found: dict[str, list[AdaptedSite]] = {}
    for name in names:
        for adapted in changing_sites(modules, adapters.by_name[name]):
            found.setdefault(adapted.site.weight, []).append(adapted)
    return found


@contextlib.contextmanager
def with_originals(modules: Modules, adapters: Adapters) -> Iterator[None]:
    """Takes merged adapters out of the weights for the time of a block, which computes in the model's precision."""
    changed: Tensors = {}
    # from the first look on, since a second thread would take the originals for weights that have changed
    with alone(modules[""]):
        originals = _present(modules, adapters, adapters.originals)
        for path, name in originals:
            with loaded(modules[path], name):
                changed[path, name] = own_parameter(modules[path], name).detach().clone()
        codes = merged_codes.merged_now(modules, adapters)
        try:
            _restore(modules, originals)
            merged_codes.put(modules, adapters.codes)
            with in_own_precision(modules):
                yield
        finally:
            _restore(modules, changed)
            merged_codes.put(modules, codes)


def refuse_lost(modules: Modules, adapters: Adapters, state_dict: Mapping[str, Any]) -> None:
    """Raises AdaptError if a state dict has other weights where adapters are merged, which `unmerge` would lose."""
    for path, name in merged_weights.merged_places(adapters):
        if path in modules:
            merged_weights.refuse_others(modules[path], [name], f"{path}." if path else "", state_dict)


def _refuse_unread(modules: Modules, adapters: Adapters, names: list[str]) -> None:
    """Raises AdaptError if what is merged in place would have no effect: something else is read in its place."""
    for name in names:
        adapter = adapters.by_name[name]
        if adapter.replaced:
            raise AdaptError(
                f"{name!r} has taken a part of {joined(list(adapter.replaced))}, so it can't be merged in place; leave "
                "it active, or call merge_and_unload()"
            )
        if (adapter.fully_trained or adapter.rows) and name not in adapters.active:
            trained = joined([path or "the model" for path in (*adapter.fully_trained, *adapter.rows)])
            raise AdaptError(
                f"{name!r} trains {trained} fully or by rows, which are read while it is active alone; "
                "activate it with set_adapter before you merge it"
            )
        tied = ((adapted.site.owner, adapted.site.attribute) for adapted in adapter.weight_sites)
        for owner, attribute in (*changed_places(modules, adapter), *tied):
            for active in adapters.active:
                other = adapters.by_name[active]
                if attribute in other.overrides.get(owner, ()) or (owner in other.rows and attribute == "weight"):
                    way_out = "call merge_and_unload()" if active == name else f"activate {name!r} alone first"
                    raise AdaptError(
                        f"an active adapter has another tensor, or other rows, in the place of "
                        f"{join(owner, attribute)}, so {name!r} can't be merged into that in place; {way_out}"
                    )
    _refuse_in_part(adapters, names)


def _refuse_in_part(adapters: Adapters, names: list[str]) -> None:
    """Raises AdaptError if adapters would be merged beside active ones, and a change depends on the other's.

    A merged adapter acts first. So a change of the weight so far is another one if that reverses the order of the two.
    A change of the base that goes on acting is another one in any case, since merging changes what the module has.
    """
    merged = [*adapters.merged, *names]
    left = [name for name in adapters.active if name not in merged]
    asked = {name: _asked_of_weights(adapters.by_name[name]) for name in (*merged, *left) if left}
    for one, other in itertools.product(merged, left):
        overtakes = one in adapters.active[adapters.active.index(other) :]
        so_far = {"weight"} if overtakes else set[str]()
        for weight in asked[one].keys() & asked[other].keys():
            in_order = overtakes and "base" not in asked[other][weight]
            way_out = f", name {one!r} before {other!r} in set_adapter" if in_order else ""
            for name, reads in ((one, so_far), (other, {"base", *so_far})):
                if reads & asked[name][weight]:
                    raise AdaptError(
                        f"the change of {weight} by {name!r} depends on the weight itself, so {one!r} can't be "
                        f"merged without {other!r}, which acts there, too; merge all that are active{way_out}, or "
                        "activate others"
                    )


def _asked_of_weights(adapter: Adapter) -> dict[str, set[str]]:
    """Returns what the changes of an adapter ask for, by their weights' paths, tied ones among them."""
    asked: dict[str, set[str]] = {}
    # sites without a merge, too: another adapter may be merged into their weight
    sites: list[Any] = [adapted for adapted in adapter.sites if isinstance(adapted.site, Site | LeafSite)]
    for adapted in sites:
        asked.setdefault(adapted.site.weight, set()).update(asks_of_weights(adapted.rule))
    return asked


def _refuse_merging(modules: Modules, adapters: Adapters, names: list[str]) -> None:
    for name in names:
        _note_parameters(modules, adapters.by_name[name])
        _refuse_unmergeable(adapters.by_name[name], name)
    override_readers(adapters, names)
    for name in names:
        refuse_missing(modules, adapters.by_name[name], name)
        refuse_empty(modules, adapters.by_name[name], name)
        _refuse_resized(modules, adapters.by_name[name], name)
        merged_weights.refuse_merged_by_others(modules, adapters, name)
        for region in {adapted.site.region for adapted in adapters.by_name[name].sites} & modules.keys():
            if template_of(modules[region]) is not None or region in adapters.lifted:
                refuse_other_options(modules[region], worn_in(adapters, region, modules))
        _refuse_tied(modules, adapters.by_name[name], name)


@torch.no_grad()
def refuse_infinite(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Raises AdaptError if a weight isn't finite into which adapters have been merged, as in a base that has NaNs."""
    for name in names:
        adapter = adapters.by_name[name]
        places = [*changed_places(modules, adapter), *((path, "weight") for path in adapter.rows)]
        places += [(path, own) for path, owns in adapter.overrides.items() for own in owns]
        for path, own in dict.fromkeys(places):
            with loaded(modules[path], own):
                _refuse_infinite(own_parameter(modules[path], own), join(path, own), name)
        for adapted in adapter.coded_sites:
            # codes have no NaNs, whatever they were made of
            for numbers in (delta(adapted, modules), quantisers.codes_of(modules[adapted.site.owner]).numbers()):
                _refuse_infinite(numbers, adapted.site.weight, name)


def _refuse_infinite(weight: torch.Tensor, path: str, name: str) -> None:
    if not torch.isfinite(weight).all():
        raise AdaptError(f"{path} with {name!r} merged into it isn't finite, but has NaNs or infinities")


def _note_parameters(modules: Modules, adapter: Adapter) -> None:
    """Notes which weights are parameters by now, as after remove_weight_norm, and were computed when adapted."""
    sites = [_with_parameter(modules, adapted) for adapted in adapter.sites]
    if sites != adapter.sites:
        adapter.exchange_sites(sites)


def _with_parameter(modules: Modules, adapted: AdaptedSite) -> AdaptedSite:
    site = adapted.site
    if not isinstance(site, Site) or site.computed is None or site.owner not in modules:
        return adapted
    is_one = modules[site.owner]._parameters.get(site.attribute) is not None
    return adapted._replace(site=site._replace(computed=None)) if is_one else adapted


def _refuse_unmergeable(adapter: Adapter, name: str) -> None:
    for adapted in adapter.sites:
        reason = adapted.unmergeable
        if reason is not None:
            raise AdaptError(
                f"{adapted.site.label} of adapter {name!r} can't be merged: {reason}; keep it, or take it off with "
                "unload()"
            )


def _refuse_resized(modules: Modules, adapter: Adapter, name: str) -> None:
    for adapted in adapter.coded_sites:
        if not quantisers.is_known(modules[adapted.site.owner]):
            raise AdaptError(
                f"{adapted.site.weight} isn't quantised any more as it was when {name!r} was adapted to it: it was "
                "exchanged, or the model was pickled, which loses the scales; keep the adapter, or load the base anew"
            )
    for adapted in changing_sites(modules, adapter):
        weight = modules[adapted.site.owner]._parameters.get(adapted.site.attribute)
        if weight is None:
            raise AdaptError(
                f"{adapted.site.weight} is no parameter any more, as after weight_norm or pruning, so {name!r} can't "
                "be merged into it; take that off first, or do it before adapting"
            )
        reason = resized(adapted, weight, name)
        if reason is not None:
            raise AdaptError(reason)


def _refuse_tied(modules: Modules, adapter: Adapter, name: str) -> None:
    holders: dict[Any, list[tuple[tuple[str, str], torch.Tensor]]] = {}
    for path, module in modules.items():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders.setdefault(lies_in(tensor), []).append(((path, own), tensor))
    changed = dict.fromkeys(changed_places(modules, adapter))
    changed |= {(path, own): None for path, names in adapter.overrides.items() for own in names}
    changed |= {(path, "weight"): None for path in adapter.rows}
    changed |= {(adapted.site.owner, "weight"): None for adapted in adapter.coded_sites}
    for path, own in changed:
        changing = tensor_at(modules[path], own)
        if any(stride == 0 and size > 1 for size, stride in zip(changing.shape, changing.stride(), strict=True)):
            raise AdaptError(f"numbers of {join(path, own)} share memory, as after expand(); give it a clone() of it")
        near = [(place, tensor) for place, tensor in holders.get(lies_in(changing), ()) if place != (path, own)]
        others = [place for place, tensor in near if share_memory(changing, tensor)]
        tied = [other for other in others if not _changes_alike(modules, adapter, name, (path, own), other)]
        if tied:
            config = adapter.config
            tying = config.option_for(Role.TYING)
            option = "" if config.keeps_tied or not tying else f", or set {tying}"
            raise AdaptError(
                f"{join(path, own)} is tied to {', '.join(join(*other) for other in tied)}, which merging would change "
                f"too; give one of them a parameter of its own before adapting{option}"
            )


def _changes_alike(
    modules: Modules, adapter: Adapter, name: str, place: tuple[str, str], other: tuple[str, str]
) -> bool:
    """Returns whether an adapter means one and the same change of a tensor at two places."""
    (path, own), (other_path, other_own) = place, other
    if own == other_own == "weight" and path in adapter.rows and other_path in adapter.rows:
        return adapter.rows[path].leader == adapter.rows[other_path].leader
    if own in adapter.fully_trained.get(path, ()) and other_own in adapter.fully_trained.get(other_path, ()):
        copies = (tensor_at(modules[at], overrides.override_name(what, name)) for at, what in (place, other))
        return memory_of(next(copies)) == memory_of(next(copies))
    tied = (a for a in adapter.weight_sites if a.shared and (a.site.owner, a.site.attribute) == other)
    return any(adapted.site.tied_to == path and _has_shared(modules, adapted) for adapted in tied)


def _has_shared(modules: Modules, adapted: AdaptedSite) -> bool:
    """Returns whether a tied site still has the very parameters of the other one."""
    module = modules[adapted.site.owner]
    return all(
        memory_of(own_parameter(module, adapted.names[local])) == memory_of(own_parameter(modules[path], name))
        for local, (path, name) in adapted.shared.items()
    )
