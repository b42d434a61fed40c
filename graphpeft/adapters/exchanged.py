"""Refuses adapters whose modules were exchanged or copied since they came, or got weights of another size.

An assignment of another module is refused at once, see `registrations.py`. The next call finds a change that goes past
that, such as an entry of ``_modules``. Compiled code doesn't look, since it would check the same once more.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import nn

from graphpeft.adapters import registrations
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Adapters, Modules, told_rows
from graphpeft.graph import in_place, overrides
from graphpeft.graph.computed_weights import computed_from
from graphpeft.graph.holders import adapters_at, has_place, has_tensor, place_of, tensor_at
from graphpeft.graph.hosts.sharding import lacking_values
from graphpeft.graph.ops import Embedding
from graphpeft.graph.paths import STATE, join, modules_by_path
from graphpeft.graph.template import names_in_slots
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.wording import joined


class _Places(NamedTuple):
    """Where the modules with the adapters that act were.

    Attributes:
        steps: The steps to them from the model: the modules of a module, their number, and the name and the module
            among these.
        tables: The modules whose size can change such that calls still run, by path.
        registered: How often modules with adapters had got another place in any model.
    """

    steps: Sequence[tuple[Mapping[str, nn.Module | None], int, str, nn.Module]]
    tables: Modules
    registered: int


def refuse_lost(model: nn.Module, adapters: Adapters) -> None:
    """Raises AdaptError in a call of a model in which an active adapter no longer has its places, or has more.

    If nothing was exchanged, that takes 55 nanoseconds for each module.
    """
    # a replica of DataParallel has no parameters, and is of a model that was looked at
    if adapters.are_off or getattr(model, "_is_replica", False):
        return
    known: _Places | None = adapters.places.get(_ACTIVE)
    if (
        known is None
        or known.registered != registrations.PLACES[0]
        or any(modules.get(name) is not child or len(modules) != count for modules, count, name, child in known.steps)
    ):
        known = adapters.places[_ACTIVE] = _places(modules_by_path(model), adapters)
    for name in adapters.active if known.tables else ():
        refuse_resized(known.tables, adapters.by_name[name], name)


_ACTIVE = "active"


def _places(modules: Modules, adapters: Adapters) -> _Places:
    """Returns the places of the active adapters."""
    paths: dict[str, None] = {}
    tables: dict[str, None] = {}
    for name in adapters.active:
        adapter = adapters.by_name[name]
        _refuse_elsewhere(modules, adapters, name)
        elsewhere(modules, adapter, name)
        paths |= dict.fromkeys(adapter.owners)
        tables |= dict.fromkeys(adapted.site.owner for adapted in adapter.weight_sites if adapted.site.op is Embedding)
        tables |= dict.fromkeys((*adapter.fully_trained, *adapter.rows))
    steps: dict[str, Any] = {}
    for path in paths:
        while path and path in modules and path not in steps:
            outer, _, own = path.rpartition(".")
            inside = modules[outer]._modules if outer in modules else {}
            steps[path] = inside, len(inside), own, inside.get(own)
            path = outer
    present = {path: modules[path] for path in tables if path in modules}
    return _Places([step for step in steps.values() if step[3] is not None], present, registrations.PLACES[0])


def _refuse_elsewhere(modules: Modules, adapters: Adapters, name: str) -> None:
    """Raises AdaptError if an adapter's tensors, or the modules in whose graphs it acts, are no longer in the model."""
    adapter = adapters.by_name[name]
    roots = {root for _, root in adapter.roots(name)}
    outer = [(path, module) for path, module in modules.items() if module._modules]
    held = {path for path, module in outer for root in roots if has_place(module, root)}
    places = dict(adapter.tensor_names(name))
    # a module that was only moved has its adapters with it
    if len(held) < len(places):
        lost = next(path for path in places if path not in held)
        raise AdaptError(_gone(lost, places[lost], name))
    in_graphs = [adapted.site.region for adapted in adapter.sites if adapted.site.own_code is None]
    regions = dict.fromkeys(in_graphs if name in adapters.slots else ())
    acting = [path for path, module in outer if name in names_in_slots(module).values()]
    if len(acting) < len(regions):
        lost = next(path for path in regions if path not in acting)
        raise AdaptError(
            f"adapter {name!r} no longer acts in {lost or 'the model'}, since that module was replaced; put it back, "
            "or delete the adapter, and replace a module before you adapt the model"
        )


def elsewhere(modules: Modules, adapter: Adapter, name: str) -> list[str]:
    """Returns the paths of modules with an adapter that aren't where it came to: of moved ones."""
    places = {*adapter.owners, *map(_REGION, adapter.sites)}
    known = {*map(id, map(modules.get, places))}
    dressed = {path: id(each) for path, each in modules.items() if path and isinstance(each, in_place.Dressed)}
    others = [path for path, number in dressed.items() if number not in known]
    if not others:
        return others
    # of adapters in a model within the model
    inner = tuple(f"{path}." for path, module in modules.items() if path and STATE in vars(module))
    found = {
        id(modules[path]): path
        for path in reversed(others)
        if name in {*adapters_at(modules[path]), *names_in_slots(modules[path]).values()}
        and not f"{path}.".startswith(inner)
    }
    for number in _known_to_others(found, modules[""], name) if found else ():
        del found[number]
    if len(known & {*dressed.values()}) + len(found) > len(places - {""}):
        raise AdaptError(
            f"{joined(sorted(found.values()))} of the model was copied with adapter {name!r} from another place, and "
            "no call would save, disable or merge it there: copy it before you adapt the model, or from one that "
            "merge_and_unload() has returned"
        )
    return sorted(found.values())


_REGION = operator.attrgetter("site.region")


def _known_to_others(found: Collection[int], model: nn.Module, name: str) -> set[int]:
    """Returns the ids of modules whose adapter belongs to a model around this one."""
    known = set[int]()
    for each in gc.get_objects():
        if issubclass(type(each), in_place.Dressed) and STATE in vars(each) and each is not model:
            adapter, inside = vars(each)[STATE].by_name.get(name), modules_by_path(each)
            if adapter is not None and any(part is model for part in inside.values()):
                places = {*adapter.owners, *map(_REGION, adapter.sites)}
                known.update(id(inside[path]) for path in places if path in inside)
    return known & {*found}


def refuse_exchanged_classes(modules: Modules, adapters: Adapters, wanted: Iterable[str] = ()) -> None:
    """Raises AdaptError if other code has replaced the class of a module at which adapters are to change."""
    changing = {*adapters.slots, *adapters.read, *wanted}
    owners = {path for name in changing for path in adapters.by_name[name].owners}
    _refuse_exchanged_classes(modules, owners | adapters.lifted.keys())


def _refuse_exchanged_classes(modules: Modules, paths: Set[str]) -> None:
    # a model has many modules, and few classes
    classes = {*map(type, map(modules.get, paths))}
    exchanged = {*filter(in_place.is_exchanged, classes)}
    for path in sorted(paths & modules.keys()) if exchanged else ():
        module = modules[path]
        if type(module) in exchanged:
            raise AdaptError(
                f"the class of {path or 'the model'} was exchanged since it was adapted, for a "
                f"{type(module).__name__}, as parametrizations do; take that off first, as "
                "torch.nn.utils.parametrize.remove_parametrizations does, or put it on before you adapt the model"
            )


def refuse_missing(modules: Modules, adapter: Adapter, name: str, reads: bool = True) -> None:
    """Raises AdaptError if a tensor of an adapter is no longer on the model, or its weight has another size."""
    places = adapter.tensor_names(name)
    refuse_removed(modules, adapter, name)
    _refuse_exchanged_classes(modules, {*adapter.owners})
    refuse_exchanged(modules, places, name)
    if not reads:
        return
    elsewhere(modules, adapter, name)
    sizes: dict[str, dict[str, Any]] = {}
    holders: dict[str, dict[nn.Module, None]] = {}
    for path, attribute in places:
        sizes[path] = {}
        holders.setdefault(path, {})[place_of(modules[path], attribute)[0]] = None
    for adapted in adapter.weight_sites:
        sizes[adapted.site.owner][adapted.site.attribute] = adapted.site.shape
    for path, known in sizes.items():
        reason = lacking_values(modules[path], known, holders[path])
        if reason is not None:
            raise AdaptError(f"the tensors of {path or 'the model'} can't be read or written: {reason}")
    refuse_resized(modules, adapter, name)


def refuse_removed(modules: Modules, adapter: Adapter, name: str) -> None:
    """Raises AdaptError if a module on which an adapter has a tensor is no longer in the model."""
    removed = {*adapter.owners} - modules.keys()
    if removed:
        place = next(place for place in adapter.tensor_names(name) if place[0] in removed)
        raise AdaptError(_gone(*place, name))


def refuse_exchanged(modules: Modules, places: Iterable[tuple[str, str]], name: str) -> None:
    """Raises AdaptError if another module is in the place of one on which an adapter has a tensor."""
    for path, attribute in places:
        if path in modules and not has_tensor(modules[path], attribute):
            raise AdaptError(_computed(modules[path], path, attribute, name) or _gone(path, attribute, name))


def _computed(module: nn.Module, path: str, attribute: str, name: str) -> str | None:
    """Returns an error if a tensor of an adapter is computed, as by a parametrization; None if it isn't."""
    around = attribute.rpartition(".")[0]
    computed = computed_from(*place_of(module, attribute)) if around and has_place(module, around) else None
    if computed is None:
        return None
    return (
        f"{join(path, attribute)} of adapter {name!r} is computed by {computed.by} from other tensors, so it can't be "
        "saved or merged; remove that first"
    )


def _gone(path: str, attribute: str, name: str) -> str:
    return (
        f"{join(path, attribute)} of adapter {name!r} is gone, since it or its module was replaced; put it back, or "
        "delete the adapter, and replace a module before you adapt the model"
    )


def refuse_resized(modules: Modules, adapter: Adapter, name: str) -> None:
    """Raises AdaptError if a tensor that an adapter changes or replaces has another size than when the adapter came."""
    for adapted in adapter.weight_sites:
        weight = _own(modules, adapted.site.owner, adapted.site.attribute)
        # most have the size that they had, and what was quantised since has another form
        if weight is None or weight.shape == adapted.site.shape or _is_part(weight) or not weight.is_floating_point():
            continue
        reason = resized(adapted, weight, name)
        if reason is not None:
            raise AdaptError(reason)
    for label, now, before in _other_sizes(modules, adapter, name):
        if now != before:
            raise AdaptError(_has_another(label, now, before, name))


def _other_sizes(
    modules: Modules, adapter: Adapter, name: str
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yields tensors that an adapter replaces, with the sizes that their modules have now and had."""
    for path, names in adapter.fully_trained.items():
        for own in names:
            tensor, other = _own(modules, path, own), overrides.override_name(own, name)
            if tensor is not None and not _is_part(tensor) and has_tensor(modules[path], other):
                trained = tensor_at(modules[path], other)
                yield join(path, own), tuple(trained.shape), tuple(tensor.shape)
    for path in adapter.rows:
        table = _own(modules, path, "weight")
        if table is not None and not _is_part(table):
            # whoever resizes a table reads it with the rows in it, and so has put the new size on what was read
            told = told_rows(modules[path])
            if told is not None:
                before = adapter.told_rows.get(path, told)
                yield join(path, "weight"), (told, *table.shape[1:]), (before, *table.shape[1:])


def _own(modules: Modules, path: str, name: str) -> torch.Tensor | None:
    """Returns a module's own tensor."""
    if path not in modules:
        return None
    tensor = modules[path]._parameters.get(name)
    return modules[path]._buffers.get(name) if tensor is None else tensor


def _is_part(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is one process's part of a sharded tensor: an empty one, or FSDP's flat one."""
    return tensor.numel() == 0 or hasattr(tensor, "_fsdp_flattened")


def resized(adapted: AdaptedSite, weight: nn.Parameter | torch.Tensor, name: str) -> str | None:
    """Returns that a site's weight, which is `weight` now, had another shape when the adapter came, or None."""
    site: Any = adapted.site
    if tuple(weight.shape) == tuple(site.shape):
        return None
    return _has_another(site.weight, tuple(weight.shape), tuple(site.shape), name)


def _has_another(label: str, now: tuple[int, ...], before: tuple[int, ...], name: str) -> str:
    return (
        f"{label} has the shape {now} now, and had {before} when {name!r} was adapted to it; resize a model before you "
        "adapt it"
    )
