"""Gives a model a saved adapter: reads its files, fits them to the model, and adapts it, or refuses the files whole."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters import checkpoint, merged_weights
from graphpeft.adapters.adapting import (
    Methods,
    carry_out,
    known_adapter,
    modules_of,
    plan_for,
    refuse,
    replicate_layers,
)
from graphpeft.adapters.base_names import other_base, warn_of_other_base
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.hotswap import is_the_same
from graphpeft.adapters.merging import with_originals
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Tensors, adapters_of
from graphpeft.adapters.tensors import complete, is_completed, overwrite
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.given_config import ConfigLike
from graphpeft.stacks.reading import read_for
from graphpeft.transaction import set_attribute, set_items, transaction
from graphpeft.wording import joined, shown

_OF_BASE = frozenset(
    {
        "device_map",
        "dtype",
        "max_memory",
        "offload_buffers",
        "offload_dir",
        "offload_folder",
        "offload_index",
        "proxies",
        "resume_download",
        "torch_dtype",
        "trust_remote_code",
    }
)
"""Options of loading a base model, which scripts pass on; an adapter has its tensors where its weights are."""


def load(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool,
    config: ConfigLike | None = None,
    *,
    activates: bool,
    methods: Methods,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    example_inputs: ExampleInputs | None = None,
    use_safetensors: bool | None = None,
    **hub_options: Any,
) -> None:
    """Gives a model a saved adapter; arguments as for `add_new` and `PeftModel.from_pretrained`."""
    _refuse_arguments(model_id, ephemeral_gpu_offload)
    own_options = {name: value for name, value in hub_options.items() if name not in _OF_BASE}
    saved = read_for(model, model_id, config, use_safetensors, own_options, key_mapping)
    loaded, values = copy.copy(saved.config), saved.tensors
    loaded.inference_mode = not is_trainable
    loaded = loaded.fitted_to(values)
    with transaction(model):
        replication = replicate_layers(model, loaded)
        plan = plan_for(model, loaded, adapter_name, example_inputs, autocast_adapter_dtype)
        refuse(plan)
        adapter = Adapter.of(plan)
        state = adapters_of(model)
        originals = merged_weights.Originals(model, state)
        if ignore_mismatched_sizes:
            # those that don't fit have their first values
            carry_out(model, adapter_name, plan, None, activates, methods, replication)
            values = without_mismatched(model, adapter_name, values)
            adapter = known_adapter(model, adapter_name)
        checkpoint.refuse_other_operations(saved.operations, adapter, adapter_name, plan.modules, values)
        of_base = other_base(model, saved.config)
        fitted = checkpoint.fitted(adapter, adapter_name, plan.modules, originals, values, of_base)
        _refuse_other_base(model, adapter, adapter_name, fitted)
        saved.refuse_two_saves(model_id)
        warn_of_other_base(model, saved.config, stacklevel=4)
        if ignore_mismatched_sizes:
            set_values(model, adapter_name, values)
        else:
            carry_out(model, adapter_name, plan, fitted, activates, methods, replication)
        if config is not None:
            _hand_over(saved.config, known_adapter(model, adapter_name))


def _hand_over(given: PeftConfig, adapter: Adapter) -> None:
    """Makes a config that was given the adapter's own, as PEFT does, unless it is another adapter's."""
    if given.is_resolved:
        return
    set_items(vars(given), vars(adapter.config))
    set_attribute(adapter, "config", given)


def _refuse_arguments(model_id: object, ephemeral_gpu_offload: bool) -> None:
    """Raises TypeError for what is no path, and ValueError for an option of PEFT's that must be False."""
    if not isinstance(model_id, str | os.PathLike):
        raise TypeError(
            f"model_id is a {type(model_id).__name__}; pass the folder of a saved adapter, or its repository on the "
            "Hub; get_peft_model(model, config) makes a new adapter"
        )
    if ephemeral_gpu_offload:
        raise ValueError(
            "ephemeral_gpu_offload=True isn't supported: an adapter is where its weight is; leave it False, and move "
            "the model as a whole"
        )


def has_adapter(model: nn.Module, adapter_name: str) -> bool:
    """Returns whether a model has an adapter of a name."""
    state = adapters_of(model)
    return state is not None and adapter_name in state.by_name


def load_over(
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool,
    config: ConfigLike | None,
    **options: Any,
) -> None:
    """Gives an adapter of a model a saved one's values, with a warning, and activates it; arguments as for `load`."""
    load_again(model, model_id, adapter_name, config, **options)
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    warnings.warn(
        f"the model has an adapter {adapter_name!r} already, which gets the saved values; for one more, choose another "
        "adapter_name",
        PeftWarning,
        stacklevel=3,
    )


def load_again(
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    config: ConfigLike | None = None,
    *,
    ephemeral_gpu_offload: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    example_inputs: ExampleInputs | None = None,
    use_safetensors: bool | None = None,
    **hub_options: Any,
) -> None:
    """Gives an adapter of a model the values of a saved one, in place, so an optimizer goes on with its tensors."""
    _refuse_arguments(model_id, ephemeral_gpu_offload)
    own_options = {name: value for name, value in hub_options.items() if name not in _OF_BASE}
    saved = read_for(model, model_id, config, use_safetensors, own_options, key_mapping)
    saved.refuse_two_saves(model_id)
    adapter = known_adapter(model, adapter_name)
    own = checkpoint.file_config(model, adapter)
    vars(own).update(saved.config.changes)
    is_known = saved.config.digest() == own.digest()
    is_of_method = saved.config.method == adapter.config.method
    if not is_known and not (
        is_of_method and is_the_same(model, adapter_name, saved.config, saved.tensors, example_inputs)
    ):
        raise AdaptError(
            f"the model has an adapter {adapter_name!r} with other options than those of {shown(model_id)}; load that "
            "under another name, or let hotswap_adapter exchange the one for the other"
        )
    with transaction(model):
        set_items(vars(adapter.config), saved.config.changes)
        set_values(model, adapter_name, saved.tensors, ignore_mismatched_sizes)


def without_mismatched(
    model: Any, adapter_name: str, values: Mapping[str, torch.Tensor], stacklevel: int = 4
) -> Mapping[str, torch.Tensor]:
    """Returns a file's tensors with an adapter's present values where shapes differ, and warns of these."""
    modules, adapter, state = modules_of(model), known_adapter(model, adapter_name), model._peft_adapters
    differing = checkpoint.mismatched(adapter, adapter_name, modules, values)
    if not differing:
        return values
    told = [f"{key} of shape {tuple(values[key].shape)} for {shape}" for key, shape in differing.items()]
    warnings.warn(
        f"ignore_mismatched_sizes=True leaves out what doesn't fit: the adapter's file has {joined(told)}; these keep "
        "the values that they have in the model",
        PeftWarning,
        stacklevel=stacklevel,
    )
    own = checkpoint.state_dict_of(modules, adapter, adapter_name, merged_weights.Originals(model, state), None)
    fitting = {key: value for key, value in values.items() if key not in differing}
    return fitting | {key: own[key] for key in differing if key in own}


def set_values(
    model: Any, adapter_name: str, values: Mapping[str, torch.Tensor], ignore_mismatched_sizes: bool = False
) -> None:
    """Gives an adapter's tensors other values.

    Args:
        model: An adapted model.
        adapter_name: The adapter's name.
        values: All tensors of the adapter, by their names in PEFT's files.
        ignore_mismatched_sizes: Whether tensors of other shapes are left out, with a warning.
    """
    modules = modules_of(model)
    adapter = known_adapter(model, adapter_name)
    refuse_missing(modules, adapter, adapter_name)
    if adapter_name in model._peft_adapters.merged:
        raise AdaptError(
            f"{adapter_name!r} is merged into the weights, which other values would leave as they are; call "
            "unmerge_adapter() before you load them"
        )
    state = model._peft_adapters
    if ignore_mismatched_sizes:
        values = without_mismatched(model, adapter_name, values)
    fitted = checkpoint.fitted(adapter, adapter_name, modules, merged_weights.Originals(model, state), values)
    with transaction(model):
        overwrite(modules, adapter, adapter_name, fitted)
        if is_completed(adapter):
            with with_originals(modules, state):
                complete(modules, adapter, adapter_name)


def _refuse_other_base(model: nn.Module, adapter: Adapter, name: str, values: Tensors) -> None:
    """Raises CheckpointError if a file has other tables for a model's embeddings and the model has other adapters."""
    state = adapters_of(model)
    others = [other for other in state.by_name if other != name] if state is not None else []
    own = set(adapter.tensor_names(name))
    replaced = [".".join(place) for place in values if place not in own]
    if others and replaced:
        raise CheckpointError(
            f"the adapter's file holds other values of the model's own {joined(replaced)}, with which its adapters "
            f"{joined(others)} would compute something else; load it on a model of its own"
        )
