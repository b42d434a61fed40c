"""Modules whose tensors are kept in main memory or on disk, by accelerate or in a checkpoint's files, between uses.

Between calls, such a module has meta tensors, which have no values. Its hook (``module._hf_hook``) has the values in
``weights_map``, a mapping by the tensors' names. Here they are loaded for code that reads or changes them otherwise
than by a call. An adapter's own tensors are never offloaded, see `holders.py`.
"""

from __future__ import annotations

import contextlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.hosts.patched_forwards import OF_HOOKS
from graphpeft.transaction import at_end_of, set_attribute


class InFiles:
    """Loads a module's tensors from files, as a hook of accelerate's does, and writes those that are changed.

    Attributes:
        weights_map: The values in the files, by the tensors' names in the module.
        keep: Writes new values, by the same names.
    """

    offload = True

    def __init__(
        self, weights_map: Mapping[str, torch.Tensor], keep: Callable[[Mapping[str, torch.Tensor]], None]
    ) -> None:
        self.weights_map, self.keep = weights_map, keep

    def pre_forward(self, module: nn.Module) -> None:
        """Loads the tensors."""
        for name, value in self.weights_map.items():
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[name] = value

    def post_forward(self, module: nn.Module, output: None) -> None:
        """Does nothing: the module's own tensors are put back by `loaded`."""

    def detach_hook(self, module: nn.Module) -> None:
        """Does nothing: the tensors stay in the files."""


def is_offloaded(module: nn.Module) -> bool:
    """Returns whether tensors of `module` itself are offloaded and not there now."""
    return _hook_of(module) is not None and any(tensor.is_meta for tensor in _own_tensors(module).values())


def is_loaded_with_others(module: nn.Module) -> bool:
    """Returns whether a hook of `module` offloads all that is inside, too, and loads it together."""
    return bool(getattr(_hook_of(module), "place_submodules", False))


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Lets `module` have the values of its own tensors for the duration of the context, if they are offloaded."""
    if not is_offloaded(module):
        yield
        return
    hook = _hook_of(module)
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    with contextlib.ExitStack() as stack:
        at_end_of(stack, _put_back, module, parameters, buffers)
        # what is read in place of the module's tensors isn't offloaded, and the hook would read that
        with in_place.without(module, "tensors"):
            hook.pre_forward(module)
        stack.callback(hook.post_forward, module, None)
        yield


def _put_back(module: nn.Module, parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
    module._parameters.update(parameters)
    module._buffers.update(buffers)


@contextlib.contextmanager
def written(module: nn.Module) -> Iterator[None]:
    """Does as `loaded`, and keeps what is written into the tensors: in main memory, from where the hook loads it."""
    if not is_offloaded(module):
        yield
        return
    with loaded(module):
        there = {name: tensor for name, tensor in _own_tensors(module).items() if name in _hook_of(module).weights_map}
        for tensor in there.values():
            # tied weights may share the memory that holds the values
            tensor.data = tensor.detach().clone()
        yield
        store(module, there)


def store(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Gives offloaded tensors of `module` other values."""
    hook = _hook_of(module)
    if isinstance(hook, InFiles):
        hook.keep(values)
        return
    before = hook.weights_map
    new = {name: value.detach().cpu() for name, value in values.items()}
    if isinstance(before, ChainMap):
        changed = ChainMap({**before.maps[0], **new}, *before.maps[1:])
    else:
        changed = ChainMap(new, before)
    set_attribute(hook, "weights_map", changed)


@contextlib.contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """Takes accelerate's hooks off `model` and all modules in it for the duration of the context, and loads tensors."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = {name: vars(module)[name] for name in OF_HOOKS if name in vars(module)}
            if "_hf_hook" in own:
                stack.enter_context(loaded(module))
                at_end_of(stack, vars(module).update, own)
                for name in own:
                    del vars(module)[name]
        yield


def _hook_of(module: nn.Module) -> Any:
    """Returns the hook that offloads tensors of `module`, or None."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return None
    hooks = getattr(hook, "hooks", (hook,))
    return next((each for each in hooks if getattr(each, "offload", False) and hasattr(each, "weights_map")), None)


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def disk_index(model: nn.Module) -> dict[str, dict[str, str] | None]:
    """Returns where weights are that were on disk when hooks came: a file of safetensors, or None for any other."""
    found: dict[str, dict[str, str] | None] = {}
    for path, module in model.named_modules():
        hook = _hook_of(module)
        index = getattr(getattr(getattr(hook, "weights_map", None), "dataset", None), "index", {})
        for name, device in getattr(hook, "original_devices", {}).items():
            key = f"{path}.{name}" if path else name
            if device.type == "meta":
                dtype = str(_own_tensors(module)[name].dtype).removeprefix("torch.")
                found[key] = {"dtype": dtype, **index[key]} if "safetensors_file" in index.get(key, {}) else None
    return found
