"""The values of a module's tensors where it doesn't hold them: accelerate has offloaded them, or they are sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from graphpeft.graph.holders import place_of, tensor_at
from graphpeft.graph.hosts import accelerate, sharding
from graphpeft.transaction import set_item


def loaded(module: nn.Module, *names: str) -> contextlib.AbstractContextManager[None]:
    """Lets `module` have the values of its own tensors for the duration of the context."""
    # a layer may have a hundred adapters
    owners = dict.fromkeys([module, *(place_of(module, name)[0] for name in names)] if names else [module])
    if "_hf_hook" in vars(module) or sharding.have_shards(owners):
        return _loaded(module, owners)
    return _THERE


_THERE = contextlib.nullcontext()


@contextlib.contextmanager
def _loaded(module: nn.Module, owners: Iterable[nn.Module]) -> Iterator[None]:
    with accelerate.loaded(module), sharding.gathered(owners):
        yield


@contextlib.contextmanager
def written(module: nn.Module) -> Iterator[None]:
    """Does as `loaded` for a module or a holder alone, and keeps what is written into its tensors."""
    with accelerate.written(module), sharding.gathered([module], is_written=True):
        yield


def value_of(module: nn.Module, name: str) -> torch.Tensor:
    """Returns the values of a tensor of a module, or of an adapter there; detached."""
    tensor = tensor_at(module, name)
    if tensor.is_meta and "." not in name:
        with accelerate.loaded(module):
            return tensor_at(module, name).detach()
    return sharding.whole(tensor.detach())


def replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of a module's own, or its values where the own one is offloaded or sharded."""
    held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    if accelerate.is_offloaded(module):
        accelerate.store(module, {name: tensor})
    elif sharding.is_sharded(held[name]):
        with torch.no_grad(), written(module):
            held[name].copy_(sharding.whole(tensor))
    else:
        set_item(held, name, tensor)
