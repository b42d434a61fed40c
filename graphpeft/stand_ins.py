"""Lets a module read other tensors in place of its own.

They are an adapter's copies of biases and of modules trained whole, and frozen weights that lack what an adapter has
taken of them. The module's own tensors stay where they are, under their own names; while an adapter is active,
``module.weight`` gives its stand-in ``module.weight_<adapter>``, whoever reads it: the module's own code, another
module, or a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphpeft import in_place

Names = tuple[str, ...]


def tensors_of(module: nn.Module) -> Names:
    """Returns the names of the parameters and buffers that `module` itself owns."""
    return tuple(name for kind in (module._parameters, module._buffers) for name, t in kind.items() if t is not None)


def refusal(module: nn.Module) -> str | None:
    """Returns the reason why `module` can't read stand-ins, or None."""
    own = {id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None}
    for name, value in module.__dict__.items():
        if isinstance(value, list | tuple) and any(id(part) in own for part in value):
            return f"a {type(module).__name__} keeps its parameters in self.{name} too, where no other can stand in"
    return None


def create(module: nn.Module, names: Names, adapter: str) -> dict[str, torch.Tensor]:
    """Returns copies of `module`'s tensors under their names as stand-ins; `module` doesn't have them yet."""
    made: dict[str, torch.Tensor] = {}
    for name in names:
        own = module._parameters[name] if name in module._parameters else module._buffers[name]
        assert own is not None
        copied = own.detach().clone()
        made[stand_in(name, adapter)] = (
            nn.Parameter(copied, own.is_floating_point()) if name in module._parameters else copied
        )
    return made


def read(module: nn.Module, adapters: Mapping[str, str]) -> None:
    """Makes `module` read stand-ins for its tensors: of which adapter, by the tensor's name."""
    in_place.put_on(module, _layer(tuple((name, stand_in(name, adapter)) for name, adapter in adapters.items())))


def read_own(module: nn.Module) -> None:
    """Makes `module` read its own tensors."""
    in_place.take_off(module, "tensors")


def own_and_stand_in(module: nn.Module, names: Names, adapter: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields each tensor of `module` among `names` with its stand-in."""
    for name in names:
        kind = module._parameters if name in module._parameters else module._buffers
        own, other = kind[name], kind[stand_in(name, adapter)]
        assert own is not None
        assert other is not None
        yield own, other


def stand_in(name: str, adapter: str) -> str:
    """Returns the name of the stand-in for the tensor `name`."""
    return f"{name}_{adapter}"


@functools.lru_cache(maxsize=1024)
def _layer(pairs: tuple[tuple[str, str], ...]) -> in_place.Layer:
    names = dict(pairs)

    def assign(module: nn.Module, name: str, value: Any) -> None:
        original: Any = in_place.original_class(module)
        original.__setattr__(module, names.get(name, name), value)

    namespace: dict[str, Any] = {own: property(functools.partial(_read, other)) for own, other in pairs}
    namespace["__setattr__"] = assign
    return in_place.Layer("tensors", (), namespace, (_layer, (pairs,)))


def _read(name: str, module: nn.Module) -> torch.Tensor:
    return getattr(module, name)
