"""An adapter's tensors by their names in PEFT's files, written and fitted to a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.base_names import base_name
from graphpeft.adapters.file_names import copies, keys, keys_of_layers, meanings, names_of_second_paths
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Modules, Tensors
from graphpeft.adapters.tensors import is_same
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph import overrides
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.hosts.sharding import whole
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.traced_model import stands_for
from graphpeft.graph.values import value_of
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Role
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec
from graphpeft.stacks.peft_files import load, write
from graphpeft.targeting import embedding_layers
from graphpeft.wording import joined, shortened


def state_dict_of(
    modules: Modules,
    adapter: Adapter,
    name: str,
    originals: Mapping[tuple[str, str], torch.Tensor],
    state_dict: Mapping[str, Any] | None,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """Returns an adapter's tensors by their names in the file."""
    base = base_name(modules[""], adapter.config)
    embeddings = embedding_layers.to_save(modules, adapter.config, base, save_embedding_layers, bool(adapter.rows))
    named = keys(adapter, name, modules)
    named |= {copy: named[of] for copy, of in copies(adapter, modules).items()}
    named |= keys_of_layers(adapter, modules, embeddings)
    places = list(named.values())
    if state_dict is None:
        tensors = {(path, attribute): value_of(modules[path], attribute) for path, attribute in places}
    else:
        lacking = [join(*place) for place in places if join(*place) not in state_dict]
        if lacking:
            raise CheckpointError(f"the state_dict lacks {joined(lacking)}; pass that of the whole adapted model")
        tensors = {place: whole(state_dict[join(*place)]) for place in places}
    tensors |= {place: originals[place].detach() for place in originals if place in tensors}
    derived: dict[str, torch.Tensor] = {}
    for adapted in adapter.sites:
        own = {local: (adapted.site.owner, adapted.names[local]) for local in adapted.specs}
        places_of_site = own | dict(adapted.shared)
        parameters = {local: tensors[place] for local, place in places_of_site.items() if place in tensors}
        derived |= adapter.config.derived_tensors(adapted.site, parameters)
    forms = _forms(adapter)
    packed = {place: forms[place].pack(tensor) if place in forms else tensor for place, tensor in tensors.items()}
    return dict(adapter.config.packed({key: packed[place] for key, place in named.items()} | derived))


def fitted(
    adapter: Adapter,
    name: str,
    modules: Modules,
    originals: Mapping[tuple[str, str], torch.Tensor],
    values: Mapping[str, torch.Tensor],
    of_base: str = "",
) -> Tensors:
    """Returns the tensors of a file by their places in the model, after checking that they fit."""
    try:
        values = adapter.config.unpacked(values)
    except ValueError as error:
        raise CheckpointError(f"the adapter's file doesn't fit: {error}") from error
    named = keys(adapter, name, modules)
    dtypes = {
        (path, overrides.override_name(own, name)): tensor.dtype
        for path, own, tensor in _fully_trained(adapter, modules)
    }
    specs, forms, of_base_model = [*_specs(adapter)], _forms(adapter), _base_keys(adapter, modules)
    dtypes |= {place: adapted.dtype for adapted, place, _ in specs if adapted.dtype.is_complex}
    dtypes |= {place: spec.dtype for _, place, spec in specs if spec.dtype is not None}
    allowed = _allowed_shapes(named, of_base_model, dict(_shapes(adapter, name, modules, forms)), forms, modules)
    base = {key: place for key, place in of_base_model.items() if key in values and key not in named}
    own = {place: tensor_at(modules[place[0]], place[1]) for place in base.values()}
    dtypes |= {place: tensor.dtype for place, tensor in own.items()}
    named |= base
    copied = {copy: of for copy, of in copies(adapter, modules).items() if copy in values}
    known = {*named, *copied, *names_of_second_paths(named, modules, adapter.config.file_prefix)}
    lacking = [key for key in named if key not in values]
    needless = [shortened(key) for key in values if known.isdisjoint(meanings(key)) and not adapter.config.ignores(key)]
    misshapen = [
        f"{key} of shape {tuple(values[key].shape)} where the model wants {shape}"
        for key, shape in _mismatched(allowed, values).items()
    ]
    # an adapter's own tensors are mostly of floating-point numbers, whatever its weights are
    wanted = {key: dtypes.get(place, torch.float32) for key, place in named.items() if key in values}
    misshapen += [
        f"{key} of {values[key].dtype} where the model wants {dtype}"
        for key, dtype in wanted.items()
        if not _becomes(values[key].dtype, dtype)
    ]
    misshapen += [
        f"other values in {copy} than in {of}, of which it is a copy"
        for copy, of in copied.items()
        if of in values and not is_same(values[copy], values[of])
    ]
    problems = [f"lacks {joined(lacking)}"] if lacking else []
    problems += [f"has what the model has no place for: {joined(needless)}"] if needless else []
    problems += [f"has {joined(misshapen)}"] if misshapen else []
    if problems:
        raise CheckpointError(
            f"the adapter's file {'; it '.join(problems)}.{of_base} Load it on the model that it was trained on; where "
            "only names differ, from_pretrained maps them by key_mapping."
        )
    found = _unpacked(forms, named, values) | dict(_unsaved(adapter, name, modules))
    _refuse_untied(adapter, name, modules, found)
    # mostly what the model has anyway
    unchanged = {
        place for place in own if is_same(originals.get(place, value_of(modules[place[0]], place[1])), found[place])
    }
    return {place: tensor for place, tensor in found.items() if place not in unchanged}


def mismatched(
    adapter: Adapter, name: str, modules: Modules, values: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """Returns the names of those tensors of a file that have other shapes than the model wants, and its shapes."""
    forms, of_base, own = _forms(adapter), _base_keys(adapter, modules), keys(adapter, name, modules)
    shapes = dict(_shapes(adapter, name, modules, forms))
    return _mismatched(_allowed_shapes(own, of_base, shapes, forms, modules), values)


_Places = Mapping[str, tuple[str, str]]
"""Places in the model by names in the file."""

_Shapes = Mapping[str, tuple[tuple[int, ...], ...]]
"""The shapes that a tensor may have in the file, the usual one first, by its name there."""


def _allowed_shapes(
    own: _Places,
    of_base: _Places,
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    forms: Mapping[tuple[str, str], FileForm],
    modules: Modules,
) -> _Shapes:
    allowed = {key: (tuple(tensor_at(modules[path], name).shape),) for key, (path, name) in of_base.items()}
    return allowed | {
        key: (shapes[place], *(forms[place].other_shapes if place in forms else ())) for key, place in own.items()
    }


def _mismatched(allowed: _Shapes, values: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {
        key: allowed[key][0]
        for key, value in values.items()
        if key in allowed and tuple(value.shape) not in allowed[key]
    }


def _becomes(dtype: torch.dtype, wanted: torch.dtype) -> bool:
    """Returns whether numbers of one dtype may be read as those of another: floating-point ones in any precision."""
    return dtype == wanted or (dtype in _FLOATING_POINT and wanted.is_floating_point)


_FLOATING_POINT = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
"""The dtypes that PyTorch converts; none that packs two numbers into a byte."""


def _base_keys(adapter: Adapter, modules: Modules) -> dict[str, tuple[str, str]]:
    """Returns names and places of the model's own tensors that a file may hold: in embeddings and adapted layers."""
    paths = [adapted.site.owner for adapted in adapter.weight_sites if adapted.site.is_layer]
    return keys_of_layers(adapter, modules, dict.fromkeys([*paths, *embedding_layers.embedding_layers(modules)]))


def _unpacked(forms: Mapping[tuple[str, str], FileForm], named: _Places, values: Mapping[str, torch.Tensor]) -> Tensors:
    try:
        return {
            place: forms[place].unpack(values[key]) if place in forms else values[key] for key, place in named.items()
        }
    except ValueError as error:
        raise CheckpointError(f"the adapter's file doesn't fit: {error}") from error


def _refuse_untied(adapter: Adapter, name: str, modules: Modules, found: Tensors) -> None:
    """Raises CheckpointError if two places that share a tensor have other values each."""
    tied = [
        ((adapted.site.owner, adapted.names[local]), place)
        for adapted in adapter.sites
        for local, place in adapted.shared.items()
    ]
    if adapter.config.keeps_tied:
        copies: dict[int, tuple[str, str]] = {}
        for path, own, tensor in _fully_trained(adapter, modules):
            place = path, overrides.override_name(own, name)
            tied.append((place, copies.setdefault(id(tensor), place)))
    tied += [
        ((path, overrides.rows(name)), (rows.leader, overrides.rows(name)))
        for path, rows in adapter.rows.items()
        if rows.key
    ]
    option = adapter.config.option_for(Role.TYING)
    tied_way_out = f"; if they are those of tied weights, load it with {option}=False in its config" if option else ""
    for place, other in tied:
        if place in found and not found[place].is_meta and not torch.equal(found[place], found[other]):
            raise CheckpointError(
                f"the adapter's file has other values for {join(*place)} than for {join(*other)}, which are one tensor "
                f"here{tied_way_out}"
            )


def _specs(adapter: Adapter) -> Iterator[tuple[AdaptedSite, tuple[str, str], ParameterSpec]]:
    """Yields each parameter at a site: the site, the parameter's place in the model, and what its rule says of it."""
    for adapted in adapter.sites:
        for local, spec in adapted.specs.items():
            yield adapted, (adapted.site.owner, adapted.names[local]), spec


def _forms(adapter: Adapter) -> dict[tuple[str, str], FileForm]:
    """Returns the forms in files of those parameters that have another one there, by their places in the model."""
    forms = {
        (adapted.site.owner, adapted.names[local]): adapter.config.file_form(adapted.site, local, spec)
        for adapted in adapter.sites
        for local, spec in adapted.specs.items()
    }
    return {place: form for place, form in forms.items() if form is not None}


def _shapes(
    adapter: Adapter, name: str, modules: Modules, forms: Mapping[tuple[str, str], FileForm]
) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    for _, place, spec in _specs(adapter):
        yield place, forms[place].shape if place in forms else spec.shape
    for path, own, tensor in _fully_trained(adapter, modules):
        yield (path, overrides.override_name(own, name)), tuple(tensor.shape)
    for path, rows in adapter.rows.items():
        yield (path, overrides.rows(name)), (len(rows.indices), tensor_at(modules[path], "weight").shape[1])


def _unsaved(adapter: Adapter, name: str, modules: Modules) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    for path, own, tensor in _fully_trained(adapter, modules):
        if own in modules[path]._non_persistent_buffers_set:
            yield (path, overrides.override_name(own, name)), tensor


def _fully_trained(adapter: Adapter, modules: Modules) -> Iterator[tuple[str, str, torch.Tensor]]:
    for path, names in adapter.fully_trained.items():
        for own in names:
            yield path, own, tensor_at(modules[path], own)


# files


def refuse_other_operations(
    operations: Mapping[str, str], adapter: Adapter, name: str, modules: Modules, values: Mapping[str, torch.Tensor]
) -> None:
    """Raises CheckpointError if a weight has tensors of another shape since another operation was found to use it."""
    if not operations:
        return
    named, shapes = keys(adapter, name, modules), dict(_shapes(adapter, name, modules, _forms(adapter)))
    differing = {place for key, place in named.items() if key in values and values[key].shape != shapes[place]}
    for adapted in adapter.weight_sites:
        site, own = adapted.site, {(adapted.site.owner, attribute) for attribute in adapted.names.values()}
        was = operations.get(site.label, site.op.__name__)
        if was != site.op.__name__ and not own.isdisjoint(differing):
            raise CheckpointError(
                f"the adapter was saved where {site.label} was found to be the weight of a {was}, and here it is "
                f"found as a {site.op.__name__}: pass the example_inputs with which the adapter was made, which "
                "tell how the model uses it"
            )


def tell_of_edits(adapter: Adapter, name: str, edited: Mapping[str, Any], gives_back: bool) -> None:
    """Refuses options that were set and don't act; warns where a file no longer says that it has taken weights."""
    for option, (was, now) in adapter.idle(edited).items():
        raise AdaptError(
            f"{option} of {name!r} was {was!r} when its tensors were made, and was set to {now!r} since, which changes "
            "nothing in the model; set it back, or make an adapter with it"
        )
    taken = edited if adapter.took_product and not gives_back else {}
    for option in taken.keys() - adapter.config.editable:
        warnings.warn(
            f"{option} of {name!r} was set since it has taken a part of the weights, which the file no longer says: "
            "pass this file as path_initial_model_for_weight_conversion alone; for a file of the adapter, set the "
            "option back",
            PeftWarning,
            stacklevel=5,
        )


def save(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    staged: Path,
    originals: Mapping[tuple[str, str], torch.Tensor],
    state_dict: Mapping[str, Any] | None = None,
    save_embedding_layers: bool | str = "auto",
    first_values: str | os.PathLike[str] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Writes one adapter into a staging folder, by default as safetensors, else as a pickle.

    With `first_values`, a folder of these, it is written as one that has taken no weights.
    """
    if edited := adapter.edited_options:
        tell_of_edits(adapter, name, edited, first_values is not None)
    tensors = state_dict_of(modules_by_path(model), adapter, name, originals, state_dict, save_embedding_layers)
    config = file_config(model, adapter)
    if first_values is not None:
        if not adapter.took_product:
            raise ValueError(
                f"path_initial_model_for_weight_conversion is for adapters that have taken a part of the weights, and "
                f"{name!r} took none when it was made; leave it None"
            )
        config, tensors = config.converted(tensors, _first_values(tensors, first_values))
    write(staged, config, tensors, safe_serialization, _operations(adapter))


def _operations(adapter: Adapter) -> dict[str, str]:
    """Returns the kinds of the operations that use weights of no layer, by the weights' labels."""
    sites = (adapted.site for adapted in adapter.weight_sites)
    return {site.label: site.op.__name__ for site in sites if not site.is_layer}


def _first_values(tensors: Mapping[str, torch.Tensor], folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads the tensors that an adapter had before it was trained."""
    found = load(folder)
    wrong = [key for key in tensors if key not in found or found[key].shape != tensors[key].shape]
    if wrong:
        raise CheckpointError(f"the first values in {folder} are another adapter's: {joined(wrong)} differ in shape")
    return {key: found[key].to(tensor.device, tensor.dtype) for key, tensor in tensors.items()}


def file_config(model: nn.Module, adapter: Adapter) -> PeftConfig:
    """Returns the config that is written: for inference, as PEFT's is, and with the model's name and class."""
    config = adapter.config.for_file([adapted.site for adapted in adapter.sites])
    config.inference_mode = True
    if config.task_type is None and config.auto_mapping is None:
        cls = stands_for(model)
        config.auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base_name(model, adapter.config)
    return config
