"""The state dict of the base model, without adapters, while the model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft._torch import IncompatibleKeys
from graphpeft.adapters import merging
from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.hosts.accelerate import is_offloaded
from graphpeft.graph.paths import unwrapped
from graphpeft.sites.quantised import backend_of
from graphpeft.wording import joined


def get_base_model_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """Returns the state dict of the base model: its own tensors, as they are without any adapter.

    Args:
        model: An adapted model. If adapters are merged, the tensors are copies.

    Returns:
        The tensors by the names that they had before the model was adapted.

    Raises:
        AdaptError: If the model has no adapters, or is offloaded.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> list(get_base_model_state_dict(model))
        ['0.weight', '0.bias']
    """
    model = unwrapped(model)
    state, modules = known_adapters(model), modules_of(model)
    _refuse_offloaded(modules)
    if not state.merged:
        return {name: tensor.detach() for name, tensor in _own_tensors(model).items()}
    with merging.with_originals(modules, state):
        # copies, since the merged values come back
        return {name: tensor.detach().clone() for name, tensor in _own_tensors(model).items()}


def _refuse_offloaded(modules: Mapping[str, nn.Module]) -> None:
    """Raises AdaptError if tensors are offloaded, which a state dict has without their values."""
    away = [path for path, module in modules.items() if is_offloaded(module)]
    if away:
        raise AdaptError(
            f"the tensors of {joined(away)} are offloaded, so that no state dict has their values; call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Gives the base model of an adapted model other values; its adapters keep theirs.

    Args:
        model: An adapted model.
        state_dict: The tensors, by the names that they had before the model was adapted.
        strict: Whether missing and unexpected names are an error.

    Returns:
        The missing and the unexpected names, as ``nn.Module.load_state_dict`` returns them.

    Raises:
        AdaptError: If the model has no adapters, some are merged, or weights are offloaded or in 4 bits; nothing is
            overwritten then.
        RuntimeError: If names are missing or unexpected and `strict` is True, or a shape differs; nothing is
            overwritten then.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> set_base_model_state_dict(model, nn.Sequential(nn.Linear(4, 4)).state_dict())
        <All keys matched successfully>
    """
    model = unwrapped(model)
    state = known_adapters(model)
    if state.merged:
        raise AdaptError(
            f"{joined(state.merged)} are merged into the weights, which other values would overwrite; call "
            "unmerge_adapter() before you load them"
        )
    _refuse_offloaded(modules_of(model))
    own = _own_tensors(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    problems = [f"Missing keys: {joined(missing)}"] if missing else []
    problems += [f"Unexpected keys, which the base model hasn't: {joined(unexpected)}"] if unexpected else []
    if strict and problems:
        raise RuntimeError(f"{'. '.join(problems)}. strict=False loads the others")
    packed = [name for name, tensor in own.items() if backend_of(tensor) == "bnb 4bit"]
    if packed:
        raise AdaptError(f"{joined(packed)} are in 4 bits, whose scales no state_dict can set; load the model anew")
    misshapen = [name for name, tensor in own.items() if name in state_dict and state_dict[name].shape != tensor.shape]
    if misshapen:
        raise RuntimeError(f"the state_dict has {joined(misshapen)} in other shapes than the model")
    model.load_state_dict({name: value for name, value in state_dict.items() if name in own}, strict=False)
    return IncompatibleKeys(missing, unexpected)


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a model's state dict without adapters' tensors, as these may stand there under several paths."""
    modules = modules_of(model)
    of_adapters = {
        id(tensor_at(modules[path], attribute))
        for name, adapter in known_adapters(model).by_name.items()
        for path, attribute in adapter.tensor_names(name)
    }
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        # what a module keeps by get_extra_state may be anything
        if isinstance(value, torch.Tensor) and id(value) not in of_adapters
    }
