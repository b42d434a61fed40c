"""Tensors of an adapter without values: on the meta device, until a file's values come in their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Modules, Tensors
from graphpeft.graph.holders import has_tensor, place_of, tensor_at
from graphpeft.transaction import set_item

_WITHOUT_VALUES = frozenset(
    {
        *("__deepcopy__", "__get__", "__hash__", "__repr__", "__set__", "clone", "data_ptr", "detach", "dim"),
        *("element_size", "is_complex", "is_contiguous", "is_floating_point", "is_shared", "nelement", "numel"),
        *("requires_grad_", "size", "storage_offset", "stride", "to", "type", "untyped_storage"),
    }
)
"""The functions of tensors that need no values."""


class Empty(nn.Parameter):
    """A parameter without values. To compute with it is an error, which it isn't for others on the meta device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _WITHOUT_VALUES:
            raise RuntimeError(
                "an adapter that was made with low_cpu_mem_usage=True has no values yet; set_peft_model_state_dict or "
                "load_adapter gives it those of a file"
            )
        return nn.Parameter.__torch_function__(func, types, args, kwargs or {})


def refuse_empty(modules: Modules, adapter: Adapter, name: str) -> None:
    """Raises AdaptError if an adapter has tensors without values."""
    places = (place for place in adapter.tensor_names(name) if has_tensor(modules[place[0]], place[1]))
    if any(isinstance(tensor_at(modules[path], own), Empty) for path, own in places):
        raise AdaptError(
            f"{name!r} has no values yet, since it was made with low_cpu_mem_usage=True: load them first, by "
            "set_peft_model_state_dict or load_adapter"
        )


def empty(modules: Modules, adapter: Adapter) -> None:
    """Takes the values of those tensors at an adapter's sites that its file will have.

    Tensors that follow from seeds and weights stay, since no file brings them back. So do copies of the model's own.
    """
    specs = [(a.site.owner, a.names[local], spec) for a in adapter.sites for local, spec in a.specs.items()]
    places = [(path, own) for path, own, spec in specs if spec.is_saved and has_tensor(modules[path], own)]
    found = {place: tensor_at(modules[place[0]], place[1]) for place in places}
    empties = {id(tensor): _like(tensor, tensor.detach().to("meta"), Empty) for tensor in found.values()}
    for place, tensor in found.items():
        _put(modules, place, empties[id(tensor)])


def fill(modules: Modules, adapter: Adapter, name: str, values: Tensors) -> Tensors:
    """Puts values of an adapter in the places of its empty tensors, and returns the other values."""
    places = [place for place in adapter.tensor_names(name) if place[0] in modules]
    found = {(path, own): tensor_at(modules[path], own) for path, own in places if has_tensor(modules[path], own)}
    made = {
        id(found[place]): _like(
            found[place], value.to(_device(modules[place[0]], value), found[place].dtype, copy=True)
        )
        for place, value in values.items()
        if place in found and found[place].is_meta
    }
    for place, tensor in found.items():
        if id(tensor) in made:
            # what several sites share remains one tensor
            _put(modules, place, made[id(tensor)])
    return {place: value for place, value in values.items() if place not in found or not found[place].is_meta}


def _like(tensor: torch.Tensor, value: torch.Tensor, cls: type[nn.Parameter] = nn.Parameter) -> torch.Tensor:
    is_parameter = isinstance(tensor, nn.Parameter)
    return cls(value.detach(), tensor.requires_grad) if is_parameter else value.detach()


def _put(modules: Modules, place: tuple[str, str], tensor: torch.Tensor) -> None:
    holder, own = place_of(modules[place[0]], place[1])
    held: dict[str, Any] = holder._parameters if own in holder._parameters else holder._buffers
    set_item(held, own, tensor)


def _device(module: nn.Module, value: torch.Tensor) -> torch.device:
    """Returns the device of a module's own parameters, or that of a value if they are empty themselves."""
    own = (parameter.device for parameter in module._parameters.values() if parameter is not None)
    return next((device for device in own if device.type != "meta"), value.device)
