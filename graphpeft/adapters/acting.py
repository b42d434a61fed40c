"""Lets exactly some adapters act: their nodes are in the graphs, and modules read their overrides and rows.

A region without any runs its own class's code again, so a disabled adapter costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from graphpeft.adapters.exchanged import refuse_exchanged_classes
from graphpeft.adapters.graphs import names_of_others, slots_for, templates_with
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.reads import layer_of, layers_apart
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.graph import in_place, overrides, slots
from graphpeft.graph.holders import HolderGroup
from graphpeft.graph.hosts.patched_forwards import newly_patched_forward
from graphpeft.graph.paths import join
from graphpeft.graph.template import Template, graph_forward, refuse_other_options
from graphpeft.transaction import set_attribute


def let_act(modules: Modules, adapters: Adapters, wanted: list[str]) -> None:
    """Makes exactly the adapters `wanted` act, in their order; those that are merged are in the weights already."""
    refuse_exchanged_classes(modules, adapters, wanted)
    readers = override_readers(adapters, wanted)
    in_graphs = [name for name in wanted if name not in adapters.merged]
    seats = slots_for(adapters, in_graphs, modules)
    templates = templates_with(adapters, seats, modules)
    before = adapters.slots_by_module()
    layers: dict[str, dict[str, in_place.Layer | None]] = {
        path: {"slots": layer} for path, layer in _slot_layers(modules, adapters, seats, before)
    }
    _put_into_slots_of_groups(modules, adapters, seats, before)
    if adapters.passes is not None:
        # they read what is in slots
        in_place.exchange_all((modules[path], of_module) for path, of_module in layers.items())
    for region, of_region in _graph_layers(modules, adapters, templates, seats, before):
        layers.setdefault(region, {}).update(of_region)
    for path, layer in layers_apart(modules, adapters, templates, seats, before):
        layers.setdefault(path, {})["reads"] = layer
    in_place.exchange_all((modules[path], of_module) for path, of_module in layers.items())
    _keep_padded(modules, templates)
    row_readers = _row_readers(adapters, wanted)
    changing = [adapters.by_name[name] for name in (*adapters.read, *wanted)]
    paths = {path for adapter in changing for path in (*adapter.overrides, *adapter.rows)}
    for path in paths & modules.keys():
        if path in readers or path in row_readers:
            others = {own: overrides.override_name(own, name) for own, name in readers.get(path, {}).items()}
            overrides.read(modules[path], others, tuple(row_readers.get(path, ())))
        else:
            overrides.read_own(modules[path])
    adapters.places.clear()
    set_attribute(adapters, "slots", seats)
    set_attribute(adapters, "read", wanted)


def refuse_newly_patched(module: nn.Module, path: str) -> None:
    """Raises AdaptError if somebody has set a forward on the module itself, which would go on as before.

    An adapted model's own forward asks in each call which adapters act, so the patched one may call it.
    """
    if newly_patched_forward(module) is None or any(each.kind == "methods" for each in in_place.layers_of(module)):
        return
    raise AdaptError(
        f"a forward was set on {path or 'the model'} itself since it was adapted, as Accelerator.prepare does with "
        "mixed precision, and would go on as before: take it off, as "
        "accelerator.unwrap_model(model, keep_fp32_wrapper=False) does, change the adapters, and set it again"
    )


def _graph_layers(
    modules: Modules,
    adapters: Adapters,
    templates: Mapping[str, Template | None],
    seats: Mapping[str, int],
    before: Mapping[str, Collection[int]],
) -> Iterator[tuple[str, Mapping[str, in_place.Layer | None]]]:
    """Yields what gives each region the graph of its template, after the passes of the model, by path."""
    seated = {slot: name for name, slot in seats.items()}
    # modules of a class have the same names in slots
    known: dict[Any, Mapping[str, in_place.Layer | None]] = {}
    for region, template in templates.items():
        module = modules[region]
        # a graph around the whole model runs around what was set on that, see model/patched_forwards.py
        if region or template is None or not template.calls_own_forward:
            refuse_newly_patched(module, region)
        plain = template
        if template is not None and adapters.passes is not None:
            template = adapters.passes(template, module)
        if template is not None:
            refuse_other_options(module, template)
        own = before.get(region, ())
        kind = template, type(module), frozenset(own)
        if kind not in known:
            layer = None
            if template is not None:
                layer = template.layer_for({**seated, **names_of_others(module, own)})
            known[kind] = {"graph": layer, "reads": layer_of(plain, module, own)}
        yield region, known[kind]


def _slot_layers(
    modules: Modules, adapters: Adapters, seats: Mapping[str, int], before: Mapping[str, Collection[int]]
) -> Iterator[tuple[str, in_place.Layer | None]]:
    """Yields what lets modules of weights have the holders there under the names of slots, by path."""
    names: dict[str, dict[int, str]] = {}
    leaving = {name for name, slot in adapters.slots.items() if seats.get(name) != slot}
    for name in (*leaving, *seats):
        for adapted in adapters.by_name[name].sites:
            of_owner = names.setdefault(adapted.site.owner, {})
            if name in seats:
                of_owner[seats[name]] = name
    for path, own in names.items():
        if path in modules:
            there = slots.read_in(modules[path]).items()
            left = before.get(path, ())
            yield path, slots.layer_for({slot: name for slot, name in there if slot not in left} | own)


def _put_into_slots_of_groups(
    modules: Modules, adapters: Adapters, seats: Mapping[str, int], before: Mapping[str, Collection[int]]
) -> None:
    """Lets groups have their holders under the names of slots."""
    names: dict[tuple[str, str], dict[int, str]] = {}
    for name in {*adapters.slots, *seats}:
        for adapted in adapters.by_name[name].sites:
            if adapted.rule.held_in:
                of_group = names.setdefault((adapted.site.owner, adapted.rule.held_in), {})
                of_group |= {seats[name]: name} if name in seats else {}
    for (path, group), own in names.items():
        holders = modules[path]._modules.get(group) if path in modules else None
        if isinstance(holders, HolderGroup):
            slots.read_in_group(holders, own, before.get(path, ()))


def override_readers(adapters: Adapters, wanted: list[str]) -> dict[str, dict[str, str]]:
    """Returns the adapter whose override is read for a tensor, by the path of its module and its name."""
    readers: dict[str, dict[str, str]] = {}
    for name in wanted:
        for path, names in adapters.by_name[name].overrides.items():
            for own in names:
                other = readers.setdefault(path, {}).setdefault(own, name)
                if other != name:
                    do = _both_do(adapters.by_name[other], adapters.by_name[name], path, own)
                    raise AdaptError(f"{other!r} and {name!r} both {do}; only one of them can be active")
    _row_readers(adapters, wanted)
    return readers


def _row_readers(adapters: Adapters, wanted: list[str]) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Returns which rows are read of each weight; refuses what two adapters both have."""
    readers: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name in wanted:
        for path, rows in adapters.by_name[name].rows.items():
            before = {index for _, indices in readers.get(path, ()) for index in indices}
            overriding = [other for other in wanted if "weight" in adapters.by_name[other].overrides.get(path, ())]
            if overriding or not before.isdisjoint(rows.indices):
                raise AdaptError(
                    f"{name!r} and another of {wanted} both train rows of {path}; only one of them can be active"
                )
            readers.setdefault(path, []).append((overrides.rows(name), rows.indices))
    return readers


def _both_do(one: Adapter, other: Adapter, path: str, name: str) -> str:
    if all(name in adapter.fully_trained.get(path, ()) for adapter in (one, other)):
        return f"fully train {path}"
    return f"have another tensor in the place of {join(path, name)}"


def _keep_padded(modules: Modules, regions: Iterable[str]) -> None:
    """Keeps ``nn.TransformerEncoder`` from handing nested tensors to layers in which a graph runs.

    In evaluation the encoder packs a padded batch into a nested tensor, which only the fused kernel of a whole layer
    takes. The kernel knows nothing of adapters, and whether it may run the encoder asks of the weights of its first
    layer alone.
    """
    for path in _around(regions) & modules.keys():
        encoder = modules[path]
        if isinstance(encoder, nn.TransformerEncoder):
            if any(graph_forward(inner) is not None for inner in encoder.layers.modules()):
                in_place.put_on(encoder, _PADDED)
            else:
                in_place.take_off(encoder, "padded")


def _around(regions: Iterable[str]) -> set[str]:
    """Returns the paths of all that is around one of these regions."""
    around: set[str] = set()
    for path in regions:
        while path and (path := path.rpartition(".")[0]) not in around:
            around.add(path)
    return around


def _is_never_nested(_: nn.Module) -> bool:
    return False


def _set_nested(encoder: nn.Module, value: Any) -> None:
    encoder.__dict__["use_nested_tensor"] = value


def _padded() -> in_place.Layer:
    return _PADDED


# of all that the encoder asks, the one that is of this alone
_PADDED = in_place.Layer("padded", (), {"use_nested_tensor": property(_is_never_nested, _set_nested)}, (_padded, ()))
