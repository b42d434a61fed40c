"""The tensors of an adapter by their names in PEFT's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from graphpeft._torch import IncompatibleKeys
from graphpeft.adapters import checkpoint, file_names, merged_weights
from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.loading import set_values
from graphpeft.graph.hosts.sharding import gathered_by_fsdp
from graphpeft.graph.paths import unwrapped
from graphpeft.stacks import peft_files
from graphpeft.stacks.reading import renamed


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,  # noqa: ARG001
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter by their names in PEFT's files.

    Args:
        model: An adapted model, also inside of PyTorch's wrappers (DDP, FSDP, ``torch.compile``). Where it is sharded,
            all processes have to call this, since each has a part of the tensors.
        state_dict: The model's state dict where it was gathered elsewhere, as distributed training does; None reads the
            tensors from the model.
        adapter_name: The name of the adapter.
        unwrap_compiled: Accepted for compatibility with PEFT; wrappers are looked through anyway.
        save_embedding_layers: Whether the tables of a Transformers model's embeddings are included: True, False, or
            ``"auto"``, which includes them if the config's `target_modules` names one, or if the vocabulary isn't that
            of the base model.

    Returns:
        The tensors, detached.

    Raises:
        AdaptError: If the model has no adapter of this name, or a module that it adapts was replaced since.
        CheckpointError: If `state_dict` lacks some of the tensors.
        ValueError: If `save_embedding_layers` is True and the model doesn't tell its embeddings.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
        {'base_model.model.0.lora_A.weight': (2, 4), 'base_model.model.0.lora_B.weight': (4, 2)}
    """
    wrapper, model = model, unwrapped(model)
    if state_dict is None:
        state_dict = gathered_by_fsdp(wrapper)
    adapter = known_adapter(model, adapter_name)
    refuse_missing(modules_of(model), adapter, adapter_name, reads=state_dict is None)
    originals = merged_weights.Originals(model, model._peft_adapters)
    return checkpoint.state_dict_of(
        modules_of(model), adapter, adapter_name, originals, state_dict, save_embedding_layers
    )


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,  # noqa: ARG001
) -> Any:
    """Overwrites the tensors of an adapter.

    Args:
        model: An adapted model, also inside of PyTorch's wrappers.
        peft_model_state_dict: All tensors of the adapter by their names in PEFT's files, as
            `get_peft_model_state_dict` returns them, or without ``base_model.model.``, as PEFT has those of a model in
            which an adapter was injected.
        adapter_name: The name of the adapter.
        ignore_mismatched_sizes: Whether tensors of other shapes are left out, with a warning that names them.
        low_cpu_mem_usage: Accepted for compatibility with PEFT: tensors without values get theirs in any case.

    Returns:
        The result of ``load_state_dict``: empty lists of missing and of unexpected keys.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or has another shape; nothing is overwritten then.
        AdaptError: If the model has no adapter of this name, it is merged, or a module that it adapts was replaced
            since; nothing is overwritten then.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> values = get_peft_model_state_dict(model)
        >>> set_peft_model_state_dict(model, {name: torch.ones_like(value) for name, value in values.items()})
        <All keys matched successfully>
        >>> bool((model[0].default.lora_B == 1).all())
        True
    """
    model = unwrapped(model)
    values = file_names.with_prefix(peft_model_state_dict, known_adapter(model, adapter_name).config.file_prefix)
    set_values(model, adapter_name, values, ignore_mismatched_sizes)
    return IncompatibleKeys([], [])


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_options: Any,
) -> dict[str, torch.Tensor]:
    """Reads the tensors of a saved adapter, by their names in its file.

    Args:
        model_id: A folder, or a repository on the Hub.
        device: Where the tensors are put; None leaves them on the CPU.
        key_mapping: Regular expressions with replacements for the names, without the prefix ``base_model.model.``; the
            first that matches a name is applied.
        **hub_options: `use_safetensors`, as in `PeftModel.from_pretrained`, and options of
            ``huggingface_hub.hf_hub_download``, such as `revision`.

    Returns:
        The tensors, which `set_peft_model_state_dict` takes.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> sorted(load_peft_weights("adapter"))
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    values = peft_files.load(model_id, **hub_options)
    if key_mapping:
        values = renamed(values, key_mapping)
    return {name: tensor.to(device or "cpu") for name, tensor in values.items()}
