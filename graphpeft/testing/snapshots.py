"""Snapshots of a model's state, to check that an operation changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from graphpeft._torch import pytree
from graphpeft.graph import overrides
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.comparing import LawError, have_equal_elements, require_equal
from graphpeft.testing.runs import run


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns the state of `model`: classes, attributes, hooks, tensors and their flags.

    >>> model = nn.Linear(2, 2)
    >>> before = snapshot(model)
    >>> _ = model.weight.requires_grad_(False)
    >>> require_unchanged(model, before, "freezing")
    Traceback (most recent call last):
    graphpeft.testing.comparing.LawError: freezing changes the tensor .weight
    """
    return {path: _state(module) for path, module in model.named_modules(remove_duplicate=False)}


def _state(module: nn.Module) -> dict[str, Any]:
    named = [*module._parameters.items(), *module._buffers.items()]
    others = {name: value for name, value in module.__dict__.items() if name not in ("_parameters", "_buffers")}
    named += [(pytree.keystr(path), value) for path, value in pytree.tree_leaves_with_path(others)]
    tensors = {
        name: (id(tensor), tensor.requires_grad, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None)
        for name, tensor in named
        if isinstance(tensor, torch.Tensor)
    }
    attributes = {name: (id(value), _content(value)) for name, value in module.__dict__.items()}
    return {"class": type(module), "attributes": attributes, "tensors": tensors}


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: id(part) for key, part in value.items()}
    return [id(part) for part in value] if isinstance(value, list | tuple | set) else None


def require_unchanged(model: nn.Module, before: dict[str, Any], operation: str) -> None:
    """Raises unless `model` is unchanged since the snapshot `before`."""
    after = snapshot(model)
    if after.keys() != before.keys():
        raise LawError(f"{operation} changes the modules: {sorted(after.keys() ^ before.keys())}")
    for path, state in before.items():
        for kind in ("class", "attributes"):
            if after[path][kind] != state[kind]:
                raise LawError(f"{operation} changes the {kind} of {path or 'the model'}")
        for name, (identity, flag, values, grad) in state["tensors"].items():
            new_identity, new_flag, new_values, new_grad = after[path]["tensors"][name]
            if (
                (identity, flag) != (new_identity, new_flag)
                or grad is not new_grad
                or not have_equal_elements(values, new_values)
            ):
                raise LawError(f"{operation} changes the tensor {path}.{name}")


def with_saved(untouched: nn.Module, adapted: Any) -> nn.Module:
    """Gives a model the copies of `modules_to_save` that active adapters have, which `unload` leaves."""
    modules, made = dict(adapted.named_modules()), {}
    for name in adapted.active_adapters:
        adapter = adapted._peft_adapters.by_name[name]
        for path, own in [(saved, own) for saved in adapter.saved for own in adapter.fully_trained[saved]]:
            tensor = tensor_at(modules[path], overrides.override_name(own, name))
            other = made.setdefault(id(tensor), copy.deepcopy(tensor))
            module = untouched.get_submodule(path)
            if own in module._parameters:
                other.requires_grad_(overrides.own_parameter(module, own).requires_grad)
                module._parameters[own] = other
            else:
                module._buffers[own] = other
    return untouched


def require_restored(model: nn.Module, untouched: nn.Module) -> None:
    """Raises unless `model` has the classes, the attributes, the keys and the flags of `untouched`."""
    if model.state_dict().keys() != untouched.state_dict().keys():
        raise LawError(f"unload leaves other keys: {sorted(model.state_dict().keys() ^ untouched.state_dict().keys())}")
    for (path, module), original in zip(model.named_modules(), untouched.modules(), strict=True):
        if _class_of(module) != _class_of(original):
            raise LawError(f"unload leaves {path or 'the model'} a {type(module)}")
        if module.__dict__.keys() != original.__dict__.keys():
            raise LawError(f"unload leaves attributes: {sorted(module.__dict__.keys() ^ original.__dict__.keys())}")
    for (path, parameter), original in zip(model.named_parameters(), untouched.parameters(), strict=True):
        if parameter.requires_grad != original.requires_grad:
            raise LawError(f"unload leaves requires_grad={parameter.requires_grad} on {path}")


def require_unloaded(model: nn.Module, untouched: nn.Module, inputs: ExampleInputs) -> None:
    """Raises unless `model` fulfils `require_restored`, and has the outputs of `untouched`, bit for bit."""
    require_restored(model, untouched)
    # frozen, since PyTorch chooses some layers' kernels by requires_grad
    found, expected = (run(each.requires_grad_(False), inputs) for each in (model, untouched))
    require_equal(found, expected, "unload leaves other outputs")


def _class_of(module: nn.Module) -> Any:
    """Returns a module's class; of a GraphModule, which has a class of its own, its base classes."""
    cls = type(module)
    return cls.__mro__[1:] if issubclass(cls, fx.GraphModule) else cls
