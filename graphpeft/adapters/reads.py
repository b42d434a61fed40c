"""Reads of an adapted layer's weight and bias by other code than the graph that has the adapter's nodes.

A parent that computes with ``self.layer.weight``, a hook, a fused loss: whoever reads the attribute gets the tensor
with the changes of the adapters that act, see `graph/changed_weight.py`. The rules' own code makes the change, so that
it is the one that merging would add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from graphpeft._torch import without_compiler
from graphpeft.adapters.adapter_names import BASE
from graphpeft.adapters.formulas import Changes, Formula, computation_of, refuse
from graphpeft.adapters.graphs import attributes_at
from graphpeft.adapters.present_rows import ROWS
from graphpeft.adapters.state import Adapter, Adapters, Modules
from graphpeft.graph import in_place
from graphpeft.graph.changed_weight import (
    ChangedWeight,
    changed_weight,
    numbers_of,
    refuse_read,
)
from graphpeft.graph.own_tensors import (
    Asker,
    ReadChanged,
    base_tensor,
    fx_tracer,
    is_keeping,
    is_on_own,
    is_recording_reads,
    is_traced_by_fx,
    own_in_fx_graph,
    own_tensor,
    read_in_fx_graph,
)
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.graph.tags import TAG, Tag, changes_at
from graphpeft.graph.template import Template, template_of
from graphpeft.transaction import set_items

Reads = tuple[tuple[str, Changes], ...]
"""The tensors of a module that others read with changes, by name."""

READS = "_graphpeft_reads"
"""The attribute of a class that has them."""


# which tensors are read so


def layer_of(template: Template | None, module: nn.Module, before: Collection[int]) -> in_place.Layer | None:
    """Returns what lets other code read the tensors that adapters change in a module's own graph; None without any."""
    others = _of_others(module, template, before)
    if template is None:
        return _layer(tuple(others.items())) if others else None
    if "reads" not in template.facts:
        reads = _in_graph(template)
        template.facts["reads"] = reads, _layer(reads) if reads else None
    in_graph, layer = template.facts["reads"]
    return _layer(_together(dict(in_graph), others)) if others else layer


def _of_others(module: nn.Module, template: Template | None, before: Collection[int]) -> dict[str, Changes]:
    """Returns the changes that adapters of a model around or inside make in no graph of a module, and their asking."""
    worn = getattr(type(module), READS, ())
    if not worn:
        return {}
    own = {*before, *(template.slots if template is not None else ())}
    left = {}
    for name, changes in worn:
        tags = tuple([tag for tag in changes.tags if tag.slot not in own])
        if tags or not changes.tags:  # without any, rows of another model may ask for it
            left[name] = changes._replace(tags=tags)
    return left


def _together(*parts: Mapping[str, Changes]) -> Reads:
    """Returns the changes of several, those of a tensor in turn."""
    found: dict[str, Changes] = {}
    for part in parts:
        for name, changes in part.items():
            before = found.get(name)
            found[name] = changes if before is None else changes._replace(tags=(*before.tags, *changes.tags))
    return tuple(found.items())


def layers_apart(
    modules: Modules,
    adapters: Adapters,
    templates: Mapping[str, Template | None],
    seats: Mapping[str, int],
    before: Mapping[str, Collection[int]],
) -> Iterator[tuple[str, in_place.Layer | None]]:
    """Yields the same by path for modules whose tensors are changed or asked for otherwise than in their own graph."""
    apart = _apart(adapters, seats) if seats else {}
    for path, reads in apart.items():
        for name, changes in reads if path in modules else ():
            _formula(name, changes).check(own_tensor(modules[path], name), path)
    left = [adapted.site.owner for name in adapters.slots for adapted in adapters.by_name[name].apart]
    for path in dict.fromkeys([*apart, *left, *adapters.asking]):
        if path in modules:
            template = templates[path] if path in templates else template_of(modules[path])
            in_graph = _in_graph(template) if template is not None and template.slots else ()
            asked = _unchanged(adapters.asking.get(path, ()))
            others = _of_others(modules[path], template, before.get(path, ()))
            reads = _together(asked, others, dict(in_graph), dict(apart.get(path, ())))
            yield path, _layer(reads) if reads else None


def _in_graph(template: Template) -> Reads:
    """Returns the tensors of a module that adapters change in its own graph."""
    tags = [changes_at(graph, site) for graph in template.graphs for site in _adapted_in(graph)]
    return _merged([Changes(of[0].weight, of[0].bias, tuple(of)) for of in tags if of])


def _adapted_in(graph: fx.Graph) -> list[str]:
    """Returns the operations, by name, that adapters change in a graph and that use a weight of its own module."""
    tags = [node.meta[TAG] for node in graph.nodes if TAG in node.meta]
    return list(dict.fromkeys([tag.site for tag in tags if tag.weight and "." not in tag.weight]))


def _merged(changes: list[Changes]) -> Reads:
    """Returns changes by the names of the tensors; each weight has those of the first of its operations."""
    found: dict[str, Changes] = {}
    for each in changes:
        found.setdefault(each.weight, each._replace(bias=None))
        biases = [tag.bias for tag in each.tags if tag.bias is not None]
        if biases and "." not in biases[0]:
            found.setdefault(biases[0], each._replace(bias=biases[0]))
    return tuple(found.items())


def _apart(adapters: Adapters, seats: Mapping[str, int]) -> dict[str, Reads]:
    """Returns the tensors that adapters change in graphs of other modules than their own, by path, or in none."""
    tags: dict[tuple[str, str], list[Tag]] = {}
    for name, slot in seats.items():
        adapter = adapters.by_name[name]
        for adapted in adapter.apart:
            tag = _tag(adapted, attributes_at(adapted, adapted.site.owner, slot), slot, adapter.config.method)
            tags.setdefault((adapted.site.owner, tag.weight), []).append(tag)
    found: dict[str, Reads] = {}
    for (path, weight), of_weight in tags.items():
        biases = [tag.bias for tag in of_weight if tag.bias is not None]
        found[path] = found.get(path, ()) + _merged([Changes(weight, biases[0] if biases else None, tuple(of_weight))])
    return found


def _tag(adapted: Any, attributes: Mapping[str, str], slot: int, method: str) -> Tag:
    """Returns the tag that a node of an adapter would have in a graph of its weight's own module."""
    return Tag(
        slot,
        method,
        adapted.site.attribute,
        rule=adapted.rule,
        attributes=tuple(attributes.items()),
        is_change=adapted.is_change,
        weight=adapted.site.attribute,
        bias=adapted.changed[1] if len(adapted.changed) > 1 else None,
        of_one_call=adapted.site.call is not None,
    )


# the attribute


@functools.lru_cache(maxsize=1024)
def _layer(reads: Reads) -> in_place.Layer:
    namespace: dict[str, Any] = {name: _attribute(_formula(name, changes)) for name, changes in reads}
    namespace |= {
        READS: reads,
        "register_parameter": _registering(frozenset(dict(reads))),
        "__setattr__": _set_attribute,
    }
    # a recurrent layer of PyTorch computes with a list of its parameters
    namespace["_flat_weights"] = property(_flat_weights, _set_flat_weights)
    return in_place.Layer("reads", (), namespace, (_layer, (reads,)))


# cached, since the rules of changes in no graph are run before they are read
_formula = functools.lru_cache(maxsize=1024)(Formula)


def _set_attribute(module: Any, name: str, value: Any) -> None:
    if type(value) is ChangedWeight and value.is_of(module, name):
        return  # the last step of ``layer.weight += 1``, which has written into the own weight
    inner = [layer.namespace.get("__setattr__") for layer in type(module)._graphpeft_layers if layer.kind == "tensors"]
    (inner[0] if inner else type(module)._graphpeft_original.__setattr__)(module, name, value)


def _registering(names: Set[str]) -> Callable[..., None]:
    def register_parameter(module: Any, name: str, param: nn.Parameter | None) -> None:
        if name in names and not Asker(0).means_own(module):
            refuse_read(module, name, "this sets")
        in_place.Dressed.register_parameter(module, name, param)

    return register_parameter


@without_compiler("Dynamo runs recurrent layers uncompiled")
def _flat_weights(module: Any) -> list[Any]:
    if "_flat_weights" not in vars(module):
        raise AttributeError(f"a {type(module).__name__} has no _flat_weights")
    if is_keeping(nn.RNNBase):
        return vars(module)["_flat_weights"]
    return [getattr(module, name, None) for name in module._flat_weights_names]


@without_compiler("Dynamo runs recurrent layers uncompiled")
def _set_flat_weights(module: Any, value: list[Any]) -> None:
    vars(module)["_flat_weights"] = value


def _attribute(formula: Formula) -> ReadChanged:
    def set_plain(module: nn.Module, value: Any) -> None:
        # nn.Module registers parameters itself; FSDP, and hooks that compute a weight, set it as a plain attribute
        vars(module)[formula.name] = value

    def delete_plain(module: nn.Module) -> None:
        del vars(module)[formula.name]

    return ReadChanged(functools.partial(_read, formula), set_plain, delete_plain)


def _read(formula: Formula, module: nn.Module) -> Any:
    if is_on_own(module):
        return own_tensor(module, formula.name)
    rows = ROWS.get()
    if torch.compiler.is_dynamo_compiling():
        in_rows = None if rows is None else rows.read(module, formula)
        return formula.captured(module) if in_rows is None else in_rows
    if is_traced_by_fx() and not is_captured():
        return _recorded(formula, module)
    own, asker = own_tensor(module, formula.name), Asker(1)
    if own is None or asker.means_own(module):
        return own
    in_rows = None if rows is None else rows.read(module, formula)
    found: Any = formula.changed(module, own) if in_rows is None else in_rows
    if asker.takes_parameters:
        found._is_param = True
        return found
    return numbers_of(found) if asker.chooses_kernels else found


def _recorded(formula: Formula, module: nn.Module) -> Any:
    """Returns what records a read: of the attribute, in a graph that has the layer; of the computation, in another."""
    own = own_in_fx_graph(module, formula.name)
    if is_recording_reads():
        return own
    tracer = fx_tracer(module, own)
    if tracer is None or not tracer.is_leaf_module(module, tracer.path_of_module(module)):
        return formula.captured(module)
    return read_in_fx_graph(tracer, getattr, module, formula.name)


# batches whose rows have different adapters


def in_mixture(
    modules: Modules, adapters: Adapters, names: Collection[str], module: nn.Module, acting: Formula
) -> Tensor | None:
    """Returns a tensor of a module for code that reads it while a batch runs whose rows have different adapters."""
    path = next((path for path, each in modules.items() if each is module), None)
    if path is None:
        return None
    tensor = acting.name
    # adapters of a model around or inside may have the slots that this model's have at other modules
    others = acting.without(
        slot for name, slot in adapters.slots.items() if path in adapters.by_name[name].modules_changed
    )
    found = {name: adapters.by_name[name] for name in names if name != BASE and not adapters.are_off}
    by_name = {name: _of_adapter(each, name, path, tensor, others) for name, each in found.items()}
    changing = [make for make in by_name.values() if make is not None]
    own = base_tensor(module, tensor)
    if not changing:
        return _formula(tensor, others).changed(module, own)
    if len(changing) == len(names) == 1:
        return changing[0](module, own)
    reason = (
        f"code beside the operation that is adapted reads {tensor} of {path or 'the model'} in a batch whose rows have "
        f"different adapters, and no one tensor is {tensor} of them all; call the model for one adapter at a time"
    )
    return changed_weight(own, computation_of(functools.partial(refuse, reason), (own,), module, tensor))


def _of_adapter(
    adapter: Adapter, name: str, path: str, tensor: str, others: Changes
) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """Returns what makes a module's tensor that of an adapter, which needn't act; None if it is the same."""
    sites = [adapted for adapted in adapter.weight_sites if adapted.site.owner == path]
    changes = dict(_merged([_changes_at(adapted, adapter.config.method) for adapted in sites])).get(tensor)
    has_others = tensor in adapter.overrides.get(path, ()) or (path in adapter.rows and tensor == "weight")
    if changes is None and not has_others:
        return None
    both = others if changes is None else changes._replace(tags=(*others.tags, *changes.tags))
    formula, read = _formula(tensor, both), adapter.reading(path, name)
    return lambda module, own: formula.changed(module, read(module).get(tensor, own))


def _changes_at(adapted: Any, method: str) -> Changes:
    tag = _tag(adapted, adapted.names, 0, method)
    return Changes(tag.weight, tag.bias, (tag,))


def let_ask(modules: Modules, adapters: Adapters, asked: Mapping[str, Iterable[str]]) -> None:
    """Lets whoever reads these tensors, by the paths of their modules, ask for the rows of the present call."""
    asking = {path: tuple(dict.fromkeys((*adapters.asking.get(path, ()), *names))) for path, names in asked.items()}
    set_items(adapters.asking, asking)
    known: dict[Any, in_place.Layer] = {}
    wanted = []
    for path, own in asking.items():
        key = type(modules[path]), own
        if key not in known:
            worn = dict(getattr(type(modules[path]), READS, ()))
            known[key] = _layer(tuple({**_unchanged(own), **worn}.items()))
        wanted.append((modules[path], {"reads": known[key]}))
    in_place.exchange_all(wanted)


def _unchanged(names: Iterable[str]) -> dict[str, Changes]:
    return {name: Changes(name, None, ()) for name in names}
