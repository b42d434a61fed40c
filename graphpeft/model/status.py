"""The state of adapters at each module and in the whole model, as PEFT's functions of these names tell it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.state import Adapter, Adapters
from graphpeft.graph.holders import has_tensor, tensor_at
from graphpeft.graph.in_place import original_class
from graphpeft.graph.paths import unwrapped
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.sites.quantised import backend_of
from graphpeft.sites.site import Site
from graphpeft.targeting.targets import match_parameter

Value = TypeVar("Value")

Irregular = Literal["irregular"]
"""Stands for what differs among the parts of a whole."""


@dataclass
class TunerLayerStatus:
    """The state of adapters at one module; the names are PEFT's.

    Attributes:
        name: The module's path in the model.
        module_type: The method of the first adapter there and the module's class, such as ``"lora.Linear"``.
        enabled: Whether adapters act, unless they are disabled in the whole model.
        active_adapters: The names of the model's active adapters.
        merged_adapters: The names of those in the module's weights.
        requires_grad: Whether the tensors of each adapter require grad, by its name.
        available_adapters: The names of the adapters that have tensors there.
        devices: The types of the devices of each adapter's tensors, by its name.
        quantization_backend: The library that quantised the module's weight, such as ``"bnb 4bit"``; None for numbers.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> model.get_layer_status()[0].module_type
        'lora.Linear'
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The state of adapters in a model; the names are PEFT's. ``"irregular"`` stands for values that differ.

    Attributes:
        base_model_type: The name of the model's class.
        adapter_model_type: The same, since no other model is around it.
        peft_types: The method of each adapter, by its name.
        trainable_params: The number of the parameters that require grad.
        total_params: The number of all parameters.
        num_adapter_layers: The number of modules with tensors of adapters.
        enabled: Whether adapters act, unless they are disabled.
        active_adapters: The names of the active adapters.
        merged_adapters: The names of those in the weights.
        requires_grad: Whether the tensors of each adapter require grad, by its name.
        available_adapters: The names of all adapters.
        devices: The types of the devices of each adapter's tensors, by its name.
        quantization_backend: The library that quantised the weights of these modules; None for numbers.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> model.get_model_status().peft_types
        {'default': 'LORA'}
        >>> print(model.get_model_status())
        Sequential with default (LORA, acts): 64 of 84 parameters train (76.19 %)
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None

    def __str__(self) -> str:
        adapters = [f"{name} ({self.peft_types[name]}, {self._state(name)})" for name in self.peft_types]
        share = 100 * self.trainable_params / max(self.total_params, 1)
        return (
            f"{self.base_model_type} with {', '.join(adapters)}: {self.trainable_params:,} of {self.total_params:,} "
            f"parameters train ({share:.2f} %)"
        )

    def _state(self, name: str) -> str:
        if name in self.merged_adapters:
            return "merged"
        if name not in self.active_adapters:
            return "rests"
        return "acts" if self.enabled else "disabled"


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Returns what adapters do at each module where they have tensors, in the model's order of modules.

    Args:
        model: An adapted model.

    Returns:
        A status for each module.

    Raises:
        AdaptError: If the model has no adapters.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> status = get_layer_status(model)[0]
        >>> status.name, status.enabled, status.requires_grad
        ('0', True, {'default': True})
    """
    model = unwrapped(model)
    state, modules = known_adapters(model), modules_of(model)
    tensors = _tensors_of(state, modules)
    return [_layer_status(path, modules[path], state, tensors[path]) for path in modules if path in tensors]


def get_model_status(model: Any) -> TunerModelStatus:
    """Returns what adapters do in a model.

    Args:
        model: An adapted model.

    Returns:
        The status of all its adapters together.

    Raises:
        AdaptError: If the model has no adapters.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> status = get_model_status(model)
        >>> status.trainable_params, status.total_params, status.active_adapters
        (16, 36, ['default'])
    """
    model = unwrapped(model)
    state, layers = known_adapters(model), get_layer_status(model)
    trainable, total = AdapterInfo.get_nb_trainable_parameters(model)
    name = original_class(model).__name__
    return TunerModelStatus(
        base_model_type=name,
        adapter_model_type=name,
        peft_types={name: adapter.config.method for name, adapter in state.by_name.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not state.are_off,
        active_adapters=list(state.active),
        merged_adapters=list(state.merged),
        requires_grad={name: _common(flags) for name, flags in _gathered(layer.requires_grad for layer in layers)},
        available_adapters=sorted(state.by_name),
        devices={
            name: sorted(set(itertools.chain(*devices)))
            for name, devices in _gathered(layer.devices for layer in layers)
        },
        quantization_backend=_common([layer.quantization_backend for layer in layers]),
    )


def _tensors_of(state: Adapters, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Returns the tensors of adapters that can be trained, by module and by adapter."""
    found: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, adapter in state.by_name.items():
        frozen = adapter.frozen_names(name)
        for path, attribute in adapter.tensor_names(name):
            if (path, attribute) not in frozen and path in modules and has_tensor(modules[path], attribute):
                found[path][name].append(tensor_at(modules[path], attribute))
    return found


def _layer_status(
    path: str, module: nn.Module, state: Adapters, tensors: Mapping[str, list[torch.Tensor]]
) -> TunerLayerStatus:
    method = state.by_name[next(iter(tensors))].config.method.lower()
    weight = module._parameters.get("weight")
    return TunerLayerStatus(
        name=path,
        module_type=f"{method}.{original_class(module).__name__}",
        enabled=not state.are_off,
        active_adapters=list(state.active),
        merged_adapters=[name for name in state.merged if name in tensors],
        requires_grad={name: _common([tensor.requires_grad for tensor in own]) for name, own in tensors.items()},
        available_adapters=sorted(tensors),
        devices={name: sorted({tensor.device.type for tensor in own}) for name, own in tensors.items()},
        quantization_backend=None if weight is None else backend_of(weight),
    )


def _gathered(values: Iterable[Mapping[str, Value]]) -> Iterable[tuple[str, list[Value]]]:
    """Returns the values of all mappings by key."""
    found: dict[str, list[Value]] = defaultdict(list)
    for each in values:
        for name, value in each.items():
            found[name].append(value)
    return found.items()


def _common(values: list[Value]) -> Value | Irregular:
    """Returns the value that all are equal to."""
    return values[0] if values and all(value == values[0] for value in values) else "irregular"


class StatusMethods(AdapterInfo):
    """The part of `PeftModel` that tells what adapters do."""

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the modules that adapters adapt, without `modules_to_save`, in the order of their coming."""
        return targeted_modules(self._peft_adapters)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the parameters that adapters adapt by their own names, in `target_parameters`."""
        return targeted_parameters(self._peft_adapters)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Returns what adapters do at each module where they have tensors, in the model's order of modules.

        Returns:
            A status for each module.
        """
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Returns what adapters do in the model.

        Returns:
            The status of all adapters together.
        """
        return get_model_status(self)


def targeted_modules(adapters: Adapters) -> list[str]:
    """Returns the paths of the modules that adapters adapt as modules, without `modules_to_save`."""
    found: dict[str, None] = {}
    for adapter in adapters.by_name.values():
        sites = (adapted.site for adapted in adapter.sites)
        found |= dict.fromkeys(site.owner for site in sites if site.owner and not _is_parameter(adapter, site))
        found |= dict.fromkeys(path for path in adapter.fully_trained if path not in adapter.saved)
    return list(found)


def targeted_parameters(adapters: Adapters) -> list[str]:
    """Returns the paths of the parameters that adapters adapt by their own names."""
    named = ((adapter, adapted.site) for adapter in adapters.by_name.values() for adapted in adapter.weight_sites)
    return list(dict.fromkeys(site.weight for adapter, site in named if _is_parameter(adapter, site)))


def _is_parameter(adapter: Adapter, site: Any) -> bool:
    """Returns whether a site is named as a parameter, or is a weight that no layer holds."""
    if not isinstance(site, Site):
        return False
    return not site.is_layer or match_parameter(adapter.config.target_options, site.weight)
