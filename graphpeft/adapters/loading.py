"""Gives a model a saved adapter: reads its files, fits them to the model, and adapts it, or refuses the files whole."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphpeft.adapters import checkpoint, file_names
from graphpeft.adapters.adapting import carry_out, modules_of, plan_for, refuse, replicate_layers
from graphpeft.adapters.base_names import other_base, warn_of_other_base
from graphpeft.adapters.state import Adapter, Tensors, adapters_of
from graphpeft.graph import in_place
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.transaction import transaction
from graphpeft.wording import joined


def load(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool,
    config: ConfigLike | None = None,
    *,
    activates: bool,
    methods: in_place.Layer,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    example_inputs: ExampleInputs | None = None,
    use_safetensors: bool = True,
    **hub_options: Any,
) -> None:
    """Gives a model a saved adapter; arguments as for `add_new` and `PeftModel.from_pretrained`.

    Raises:
        AdaptError: If it can't be added, as in all cases the model is as it was.
        CheckpointError: If the file doesn't fit the model.
        FileNotFoundError: If there is none.
        TypeError: If `model_id` is no path, or `config` no config.
        ValueError: If an option is True that must be False.
    """
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
    if ignore_mismatched_sizes:
        raise ValueError(
            "ignore_mismatched_sizes=True isn't supported: an adapter is loaded whole or not at all. Adapt the model "
            "with get_peft_model, put the tensors that fit into what get_peft_model_state_dict gives, and that into "
            "set_peft_model_state_dict"
        )
    if config is not None:
        values = checkpoint.load(model_id, use_safetensors=use_safetensors, **hub_options)
        saved = checkpoint.SavedAdapter(as_config(config), values)
    else:
        saved = checkpoint.read(model_id, use_safetensors=use_safetensors, **hub_options)
    loaded, values = copy.copy(saved.config), saved.tensors
    loaded.inference_mode = not is_trainable
    if key_mapping:
        values = file_names.renamed(values, key_mapping)
    loaded = loaded.fitted_to(values)
    with transaction(model):
        replication = replicate_layers(model, loaded)
        plan = plan_for(model, loaded, adapter_name, example_inputs, autocast_adapter_dtype)
        refuse(plan)
        adapter = Adapter.of(plan)
        state = adapters_of(model)
        originals = state.originals if state is not None else {}
        saved.refuse_other_operations(adapter, adapter_name, modules_of(model), values)
        of_base = other_base(model, saved.config)
        fitted = checkpoint.fitted(adapter, adapter_name, modules_of(model), originals, values, of_base)
        _refuse_other_base(model, adapter, adapter_name, fitted)
        saved.refuse_two_saves(model_id)
        warn_of_other_base(model, saved.config, stacklevel=4)
        carry_out(model, adapter_name, plan, fitted, activates, methods, replication)


def _refuse_other_base(model: nn.Module, adapter: Adapter, name: str, values: Tensors) -> None:
    """Raises CheckpointError if a file has other tables for a model's embeddings and the model has other adapters."""
    state = adapters_of(model)
    others = list(state.by_name) if state is not None else []
    own = set(adapter.tensor_names(name))
    replaced = [".".join(place) for place in values if place not in own]
    if others and replaced:
        raise checkpoint.CheckpointError(
            f"the adapter's file holds other values of the model's own {joined(replaced)}, with which its adapters "
            f"{joined(others)} would compute something else; load it on a model of its own"
        )
