"""Where an adapter's tensors and numbers live: on a module of their own inside each module that it adapts.

``q_proj.default.lora_A`` is the tensor `lora_A` of the adapter ``default`` at `q_proj`. So names of tensors have the
adapter's name as a component of their path, as in PEFT, and all of an adapter at a module comes and goes as one object.
Code that goes through a model's own modules leaves holders out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from graphpeft._torch import can_take_data
from graphpeft.graph.sharding import distributed_as, is_sharded


class Holder(nn.Module):
    """The tensors of one adapter at a module, as its parameters and buffers; its numbers are plain attributes.

    Holders may have tensors in common, as several modules may have a tied parameter.
    """

    _graphpeft_method = "adapter"
    _graphpeft_options = ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":
            # accelerate begins to put a hook here, and next exchanges the tensors
            vars(self)[_BEFORE_HOOK] = dict(self._parameters), dict(self._buffers)
        elif name == "_hf_hook":
            self._stay(getattr(value, "hooks", (value,)))
        elif name != "forward":
            super().__setattr__(name, value)

    def _stay(self, hooks: Iterable[Any]) -> None:
        """Takes back what hooks of accelerate have done, and goes to the device where they let the layer around run.

        They act when a module is called, which a holder isn't. And what is offloaded is another tensor in each call, so
        nothing would be trained.
        """
        parameters, buffers = vars(self).pop(_BEFORE_HOOK, ({}, {}))
        self._parameters.update(parameters)
        self._buffers.update(buffers)
        devices = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
        for device in devices:
            self.to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Holder:
        """Moves or converts the tensors; a buffer stays the object that it is, as PyTorch lets parameters stay."""
        before = dict(self._parameters), dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_shared(*before)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Loads a state dict; one that is assigned gives its tensors' data to those here, which others may have."""
        before = dict(self._parameters), dict(self._buffers)
        super()._load_from_state_dict(*args)
        self._keep_shared(*before)

    def _keep_shared(self, parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
        """Lets tensors that have come in the places of others be one tensor wherever holders shared one.

        Args:
            parameters: The parameters that were here before.
            buffers: The buffers that were here before.
        """
        for held, before in ((self._parameters, parameters), (self._buffers, buffers)):
            for name, tensor in before.items():
                new: Any = held.get(name)
                if new is not None and tensor is not None and new is not tensor:
                    held[name] = _in_place_of(tensor, new)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises RuntimeError: only code that calls all submodules of an adapted module calls a holder."""
        raise RuntimeError(
            "an adapter's tensors were called as a layer: the adapted module around them calls all of its submodules, "
            "by children() or _modules. Put these into an nn.Sequential or nn.ModuleList inside of it"
        )

    def extra_repr(self) -> str:
        """Returns the options, and the names and shapes of the tensors, for ``print(model)``."""
        named = (*self._parameters.items(), *self._buffers.items())
        tensors = ", ".join(f"{name}{tuple(tensor.shape)}" for name, tensor in named if tensor is not None)
        return "; ".join(filter(None, (self._graphpeft_options, tensors)))

    def _get_name(self) -> str:
        return self._graphpeft_method


_BEFORE_HOOK = "_graphpeft_before_hook"


def holder_for(module: nn.Module, method: str, options: str) -> Holder:
    """Returns an empty holder for an adapter at `module`.

    Args:
        module: The module.
        method: The adapter's method, for ``print(model)``.
        options: Its options, likewise.
    """
    wrapping: Any = sys.modules.get("torch.distributed.fsdp.wrap")
    if wrapping is not None:
        # what FSDP wraps is whole in its own call alone, and no holder is called
        wrapping.size_based_auto_wrap_policy.EXCLUDE_WRAP_MODULES.add(Holder)
    holder = Holder()
    vars(holder).update(training=module.training, _graphpeft_method=method, _graphpeft_options=options)
    return holder


def name_at(adapter: str, name: str) -> str:
    """Returns the name, at the module that is adapted, of what the adapter's holder has as `name`."""
    return f"{adapter}.{name}"


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that itself has the attribute `name` of `module`, and its name there.

    Args:
        module: A module.
        name: The name of an attribute, or of an adapter's as `name_at` returns it.

    Raises:
        KeyError: If the module has no holder of that adapter.
    """
    adapter, dot, own = name.rpartition(".")
    if not dot:
        return module, name
    holder = module._modules[adapter]
    assert holder is not None
    return holder, own


def value_at(module: nn.Module, name: str) -> Any:
    """Returns the attribute `name` of `module`, which may be an adapter's."""
    holder, own = place_of(module, name)
    return getattr(holder, own)


def as_number(value: Any) -> Any:
    """Returns a number that an adapter has, which may be in a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """Returns the parameter or buffer itself, whatever is read in its place."""
    holder, own = place_of(module, name)
    tensor = holder._parameters[own] if own in holder._parameters else holder._buffers[own]
    assert tensor is not None
    return tensor


def has_tensor(module: nn.Module, name: str) -> bool:
    """Returns whether `module` has the parameter or buffer `name`, which may be an adapter's."""
    adapter, dot, own = name.rpartition(".")
    holder = module._modules.get(adapter) if dot else module
    held = () if holder is None else (holder._parameters, holder._buffers)
    return any(tensors.get(own) is not None for tensors in held)


def has_own_modules(module: nn.Module) -> bool:
    """Returns whether `module` has submodules beside the holders of adapters."""
    return any(not isinstance(child, Holder) for child in module._modules.values())


def all_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that `module` has itself and those that adapters have there, with their names."""
    held = [(f"{name}.", child) for name, child in module._modules.items() if isinstance(child, Holder)]
    for prefix, owner in (("", module), *held):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter


def without_holders(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Leaves out holders among modules and their paths."""
    return ((path, module) for path, module in modules if not isinstance(module, Holder))


def distribute_adapters(module: nn.Module, weight: Any) -> None:
    """Distributes the tensors of adapters at `module` as its weight is; those that several adapters share stay one."""
    for holder in module._modules.values():
        tensors: tuple[Any, ...] = (holder._parameters, holder._buffers) if isinstance(holder, Holder) else ()
        for held in tensors:
            for name, tensor in held.items():
                if tensor is not None and not is_sharded(tensor):
                    known = _BECOME.get(tensor)
                    held[name] = _BECOME[tensor] = distributed_as(tensor, weight) if known is None else known


_BECOME: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What tensors have become that other holders may have, too."""


@torch.no_grad()
def _in_place_of(tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns what holders of a tensor are to have where another one was to come in its place: the same in all."""
    if not any(hasattr(each, "__tensor_flatten__") for each in (tensor, new)) and can_take_data(tensor, new):
        tensor.data = new
        return tensor
    known: Any = _BECOME.get(tensor)
    if known is None or (known.shape, known.dtype, known.device) != (new.shape, new.dtype, new.device):
        _BECOME[tensor] = new
        return new
    if known is not new and not known.is_meta:
        known.copy_(new)
    return known
