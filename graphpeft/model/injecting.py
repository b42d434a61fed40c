"""Adapts a model as PEFT's `inject_adapter_in_model` does: by a config, or by the names in a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.wording import joined


def inject_adapter_in_model(
    peft_config: ConfigLike,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> Any:
    """Adapts a model in place, as `get_peft_model` does, at the modules that a state dict names if there is one.

    Args:
        peft_config: A config of this library or of PEFT; its class is the method.
        model: The model, adapted or not.
        adapter_name: The adapter's name.
        low_cpu_mem_usage: Whether the new tensors have no values, as in `get_peft_model`.
        state_dict: Tensors by the names that an adapter's have in files, with or without the prefix
            ``base_model.model.``; the modules in these names are adapted, and the values aren't used. None adapts those
            that the config names.
        example_inputs: A tuple of positional or a dict of keyword arguments with which the whole model can be called;
            needed where `get_peft_model` needs it.

    Returns:
        `model` itself, which has the methods of `PeftModel`.

    Raises:
        ValueError: If the config is one of a prompt method.
        AdaptError: If the model can't be adapted, as in `get_peft_model`, or hasn't all modules that the state dict
            names. The model is unchanged then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        >>> names = {"1.lora_A.weight": None, "1.lora_B.weight": None}
        >>> model = inject_adapter_in_model(LoraConfig(r=2), model, state_dict=names)
        >>> [status.name for status in model.get_layer_status()]
        ['1']
    """
    config = as_config(peft_config)
    if config.is_prompt_learning:
        raise ValueError(f"{config.method} adapts no modules of the model; call get_peft_model(model, config)")
    if state_dict is None:
        return get_peft_model(
            model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, example_inputs=example_inputs
        )
    named = _modules_in(config, state_dict)
    modules = {path for path, _ in model.named_modules()}
    lacking = sorted(named - modules)
    if lacking:
        raise AdaptError(f"the state_dict is of a model with {joined(lacking)}, which this one hasn't")
    config = config.from_dict(config.to_dict() | {"target_modules": sorted(named)})
    names_more = any(path.endswith(tuple(f".{name}" for name in named)) for path in modules - named)
    narrows = names_more or config.target_options.target_parameters
    where = (lambda site: site.owner in named) if narrows else None
    return get_peft_model(
        model,
        config,
        adapter_name,
        low_cpu_mem_usage=low_cpu_mem_usage,
        example_inputs=example_inputs,
        where=where,
    )


def _modules_in(config: Any, state_dict: Mapping[str, Any]) -> set[str]:
    """Returns the paths of modules for which a state dict has tensors of the config's method."""
    parts = (key.removeprefix("base_model.model.").rsplit(f".{config.prefix}", 1) for key in state_dict)
    # what a file has once for all modules is called base_model.<name>
    found = {path for path, *rest in parts if rest and path != "base_model"}
    if not found:
        raise AdaptError(f"the state_dict has no tensor of {config.method}, whose names have .{config.prefix}")
    return found
