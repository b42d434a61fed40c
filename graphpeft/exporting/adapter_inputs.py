"""An adapter's tensors as arguments of the model: ``model(x, adapters={"base_model.model.….lora_A.weight": A, …})``.

The tensors have the names in PEFT's files. Numbers that the adapter's rules read, such as the scale, are inputs, too:
tensors of shape () named by the module and the rule. So one graph serves all adapters of equal shapes.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphpeft._torch import printed_target
from graphpeft.adapters import file_names
from graphpeft.adapters.graphs import slots_for, templates_with, worn_in
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.exporting.errors import ExportError
from graphpeft.graph.holders import place_of, tensor_at, value_at
from graphpeft.graph.ops.reading import applied_if
from graphpeft.graph.paths import join, modules_by_path, within
from graphpeft.graph.recorded import is_identity_in_evaluation
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import Graphs, Template, template_of, wear_template
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.wording import joined

Place = tuple[str, str]
"""The path of a module, and the name of its attribute."""


class AdapterInput(NamedTuple):
    """A tensor of an adapter that is an input of an exported model.

    Attributes:
        value: The tensor, of shape () for a number such as the scale; on the meta device if only the shape and dtype
            are known.
        places: The attributes from which the model reads the tensor; all after the first are tied to the first.
        is_number: Whether the attributes are numbers.
    """

    value: Tensor
    places: tuple[Place, ...] = ()
    is_number: bool = False


class AdapterInputs(NamedTuple):
    """An adapter as inputs of an exported model; also the inputs that an exported file takes, as stored in the file.

    Attributes:
        inputs: The tensors and numbers by input name, sorted.
        method: The `peft_type` of the adapter's method.
        computations: Digests of the computations with the inputs, see `computations_of`.
    """

    inputs: Mapping[str, AdapterInput]
    method: str
    computations: Mapping[str, str]


def inputs_of(model: Any, name: str) -> AdapterInputs:
    """Returns an adapter of a model as inputs."""
    adapter: Adapter = model._peft_adapters.by_name[name]
    modules = modules_by_path(model)
    _refuse_changed_weights(adapter, name)
    places: dict[int, list[Place]] = {}
    for place in adapter.tensor_names(name):
        places.setdefault(id(_tensor(modules, place)), []).append(place)
    found = {}
    for key, place in file_names.keys(adapter, name, modules).items():
        tensor = _tensor(modules, place)
        first, *_ = places[id(tensor)]
        if place == first:  # tied tensors are one input, though files name each place
            found[key] = AdapterInput(tensor.detach(), tuple(places[id(tensor)]))
    devices = {path: _tensor(modules, (path, attribute)).device for path, attribute in adapter.tensor_names(name)}
    for key, (path, attribute) in file_names.constant_keys(adapter, modules).items():
        number = torch.tensor(float(value_at(modules[path], attribute)), device=devices[path])
        found[key] = AdapterInput(number, ((path, attribute),), is_number=True)
    # sorted, since AOTInductor's loader relies on the order of the dictionary, which each caller must reproduce
    return AdapterInputs(dict(sorted(found.items())), adapter.config.method, computations_of(model, name))


def _refuse_changed_weights(adapter: Adapter, name: str) -> None:
    if adapter.replaced:
        raise ExportError(
            f"adapter {name!r} has taken a part of {joined(list(adapter.replaced))}, which another adapter wouldn't "
            "have taken. Save it by save_pretrained with path_initial_model_for_weight_conversion, load that, and "
            "export it; or use adapters='baked'"
        )
    unsaved = [local for adapted in adapter.sites for local, spec in adapted.specs.items() if not spec.is_saved]
    if unsaved:
        raise ExportError(
            f"adapter {name!r} has {list(dict.fromkeys(unsaved))}, which no file has, so no other adapter could be "
            "given in its place; use adapters='baked' or 'merged'"
        )
    if adapter.overwritten:
        changed = [join(*place) for place in adapter.overwritten]
        raise ExportError(
            f"the file of adapter {name!r} has brought other values of the model's own {joined(changed)}, which other "
            "adapters wouldn't have. Export it with adapters='baked' or 'merged'"
        )


def _tensor(modules: Modules, place: Place) -> Tensor:
    path, name = place
    return tensor_at(modules[path], name)


def fitted(found: AdapterInputs, wanted: AdapterInputs, adapter: str, exported: str) -> dict[str, Tensor]:
    """Returns the values of an adapter for the inputs of an exported model, in the model's dtypes."""
    if found.method != wanted.method:
        raise ExportError(
            f"adapter {adapter!r} is of the method {found.method}, and the inputs of {exported} {wanted.method}"
        )
    _refuse_other_tensors(found.inputs, wanted.inputs, adapter, exported)
    _refuse_other_computations(found.computations, wanted.computations, adapter, exported)
    return {key: found.inputs[key].value.to(one.value.dtype) for key, one in wanted.inputs.items()}


def _refuse_other_tensors(
    found: Mapping[str, AdapterInput], wanted: Mapping[str, AdapterInput], adapter: str, exported: str
) -> None:
    shapes = {key: tuple(one.value.shape) for key, one in found.items() if key in wanted or not one.is_number}
    expected = {key: tuple(one.value.shape) for key, one in wanted.items()}
    lacking = [key for key in expected if key not in shapes]
    needless = [key for key in shapes if key not in expected]
    misshapen = [
        f"{key} of the shape {shape} in place of {expected[key]}"
        for key, shape in shapes.items()
        if key in expected and shape != expected[key]
    ]
    problems = [f"lacks {joined(lacking)}"] if lacking else []
    problems += [f"has {joined(needless)} too much"] if needless else []
    problems += [f"has {joined(misshapen)}"] if misshapen else []
    if problems:
        raise ExportError(
            f"adapter {adapter!r} doesn't fit the inputs of {exported}: it {'; it '.join(problems)}. One graph serves "
            "adapters with the same targets and ranks; export this one by itself, or give it these"
        )


def _refuse_other_computations(
    found: Mapping[str, str], wanted: Mapping[str, str], adapter: str, exported: str
) -> None:
    others = [path or "the model" for path in {**wanted, **found} if found.get(path) != wanted.get(path)]
    if others:
        raise ExportError(
            f"adapter {adapter!r} doesn't fit {exported}, though its tensors do: something else is computed with them "
            f"in {joined(others)}, since it has other rows, parts or options, or is cast from another dtype. Export it "
            "by itself"
        )


# computations


def computations_of(model: Any, name: str) -> dict[str, str]:
    """Returns a digest of an adapter's computation in each module that it changes, by the module's path.

    One graph serves two adapters only if their digests are equal, too. Equal shapes of tensors aren't enough, since the
    graph fixes the adapted parts of a weight, the rows of an embedding, and options of some methods.
    """
    adapters: Adapters = model._peft_adapters
    adapter, modules = adapters.by_name[name], modules_by_path(model)
    seats = slots_for(adapters, [name], modules)
    templates = templates_with(adapters, seats, modules)
    found = {}
    for region, sites in _regions(adapter, modules).items():
        template = templates.get(region) or worn_in(adapters, region, modules)
        places = {
            join(within(adapted.site.owner, region), attribute): f"{adapted.site.label} {local}"
            for adapted in sites
            for local, attribute in adapted.in_slot(seats[name]).items()
        }
        found[region] = _computed(template, seats[name], places)
    return found | {path: f"{found.get(path, '')}{list(rows.indices)}" for path, rows in adapter.rows.items()}


def _computed(template: Template, slot: int, places: Mapping[str, str]) -> str:
    """Returns a digest of the adapter's nodes that change a value of the model in evaluation."""
    graphs = template.copied_graphs()
    _with_tensors(graphs)
    known: dict[fx.Node, str] = {}
    for node in graphs[0].nodes:
        if TAG in node.meta and node.meta[TAG].slot == slot:
            target = places.get(str(node.target)) or printed_target(node)
            arguments = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = _digest(f"{node.op} {target} {arguments}")
        else:
            # nodes of the model are equal anyway; the name of a placeholder shows which argument an adapter changes
            known[node] = f"{node.op} {node.target if node.op == 'placeholder' else ''}"
    results = [value for node, value in known.items() if TAG in node.meta and node.meta[TAG].place]
    return _digest(" ".join(results))


def _digest(text: str) -> str:
    without_addresses = re.sub(r"0x[0-9a-f]+", "", text)
    return hashlib.sha256(without_addresses.encode()).hexdigest()[:16]


# numbers as tensors


def take_numbers_as_tensors(model: Any, name: str) -> None:
    """Changes the graphs of an active adapter so that its numbers can be tensors.

    Dropout and nodes for training need Python numbers. They are removed, since the model is in evaluation mode.
    """
    modules = modules_by_path(model)
    for region in _regions(model._peft_adapters.by_name[name], modules):
        template = template_of(modules[region])
        if template is not None:
            wear_template(modules[region], template.derive(("numbers are tensors",), _with_tensors))


def _with_tensors(graphs: Graphs) -> None:
    for graph in graphs:
        for node in [node for node in graph.nodes if TAG in node.meta]:
            if is_identity_in_evaluation(node.target):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            elif node.target is applied_if and _is_training(node.args[0]):
                node.replace_all_uses_with(node.args[1])
                graph.erase_node(node)


def _is_training(condition: Any) -> bool:
    return isinstance(condition, fx.Node) and str(condition.target).rpartition(".")[2] == "training"


def unread(model: Any, name: str, inputs: Mapping[str, AdapterInput]) -> list[str]:
    """Returns the names of the numbers among `inputs` that no graph of an adapter reads."""
    adapter: Adapter = model._peft_adapters.by_name[name]
    modules = modules_by_path(model)
    read: set[Place] = set()
    for region, sites in _regions(adapter, modules).items():
        template = template_of(modules[region])
        if template is not None:
            slot = model._peft_adapters.slots[name]
            read |= {place for adapted in sites for place in _numbers_read(template, adapted, region, slot)}
    return [key for key, given in inputs.items() if given.is_number and read.isdisjoint(given.places)]


def _numbers_read(template: Template, adapted: AdaptedSite, region: str, slot: int) -> Iterator[Place]:
    paths = {node.target for graph in template.graphs for node in graph.nodes if node.op == "get_attr" and node.users}
    in_slot = adapted.in_slot(slot)
    for constant in adapted.constants:
        if join(within(adapted.site.owner, region), in_slot[constant]) in paths:
            yield adapted.site.owner, adapted.names[constant]


def _regions(adapter: Adapter, modules: Modules) -> dict[str, list[AdaptedSite]]:
    found: dict[str, list[AdaptedSite]] = {}
    for adapted in adapter.sites:
        if adapted.site.region in modules:
            found.setdefault(adapted.site.region, []).append(adapted)
    return found


# arguments


@contextlib.contextmanager
def given(modules: Modules, inputs: Mapping[str, AdapterInput], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the tensors `values`, by input name, at the places where a model reads them, inside the context."""
    places = [(place_of(modules[path], name), key) for key, one in inputs.items() for path, name in one.places]
    numbers = [(vars(holder), own, vars(holder)[own]) for (holder, own), _ in places if own in vars(holder)]
    try:
        for (holder, own), key in places:
            vars(holder)[own] = values[key]
        yield
    finally:
        for (holder, own), _ in places:
            vars(holder).pop(own, None)
        for held, own, number in numbers:
            held[own] = number
