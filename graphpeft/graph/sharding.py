"""Modules whose tensors are sharded over processes: each has a part, and a ``DTensor`` says what the whole is.

``fully_shard`` puts whole tensors in their places for each call alone. Here they are gathered for code that reads or
writes values otherwise. All processes have to do that, and in the same order, since gathering needs each of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft._torch import version
from graphpeft.graph.sharded_classes import under_shards
from graphpeft.transaction import at_end_of, remember


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor is a ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """Returns a tensor with all its values, gathered from all processes if it is sharded."""
    if not is_sharded(tensor):
        return tensor
    # a process group gathers on its own device, where fully_shard's CPUOffloadPolicy doesn't leave parameters
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


@contextlib.contextmanager
def gathered(owners: Iterable[nn.Module], is_written: bool = False) -> Iterator[None]:
    """Lets modules have their own tensors whole for the duration of the context.

    Args:
        owners: The modules.
        is_written: Whether what is written into the whole tensors is to be in the sharded ones afterwards.
    """
    with contextlib.ExitStack() as stack:
        exchanged: list[tuple[Any, torch.Tensor, int]] = []
        for owner in owners:
            held: dict[str, Any]
            for held in (owner._parameters, owner._buffers):
                for name, tensor in held.items():
                    if is_sharded(tensor):
                        at_end_of(stack, held.__setitem__, name, tensor)
                        full = whole(tensor)
                        full = nn.Parameter(full, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full
                        held[name] = full
                        exchanged.append((tensor, full, version(full)))
        yield
        for tensor, full, before in exchanged if is_written else ():
            if version(full) != before:
                _write(tensor, full)


@torch.no_grad()
def _write(tensor: Any, full: torch.Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    remember(tensor)
    # each process has the same values already
    part = distribute_tensor(full.detach(), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(part.to(tensor.device))


def reshard(modules: Iterable[nn.Module]) -> None:
    """Puts sharded tensors into their places where `fully_shard` has left the whole ones after a forward."""
    for module in modules:
        if under_shards(type(module)) is not type(module) and hasattr(module, "reshard"):
            sharded: Any = module
            sharded.reshard()


def is_managed(module: nn.Module) -> bool:
    """Returns whether `fully_shard` or FSDP shards the tensors that `module` had then, and sums up gradients."""
    return "_is_fsdp_managed_module" in vars(module)


def lacking_values(module: nn.Module, sizes: Mapping[str, Sequence[int]]) -> str | None:
    """Returns why the tensors of `module` and its adapters can't be read here, if this process has a part of them.

    Args:
        module: The module.
        sizes: The shapes of its tensors that are known, by their names.
    """
    held = [t for inner in module.modules() for t in inner._parameters.values() if t is not None]
    if any(hasattr(tensor, "ds_id") and tensor.numel() == 0 for tensor in held):
        return "DeepSpeed's ZeRO-3 has partitioned them; pass the whole model's state dict as state_dict"
    flat = [tensor for tensor in held if hasattr(tensor, "_fsdp_flattened")]
    known = [(module._parameters.get(name), tuple(shape)) for name, shape in sizes.items()]
    if (flat and any(t.numel() == 0 for t in flat)) or any(
        t is not None and hasattr(t, "_fsdp_flattened") and tuple(t.shape) != shape for t, shape in known
    ):
        return (
            "FullyShardedDataParallel has flattened them; do this inside of "
            "FullyShardedDataParallel.summon_full_params(wrapper), or give its state dict as state_dict"
        )
    return None


def is_asked_by_fsdp() -> bool:
    """Returns whether code of FSDP has called the caller: it reads ``module.weight`` to see if that was exchanged."""
    if torch.compiler.is_compiling():
        return False
    return sys._getframe(2).f_globals.get("__name__", "").startswith("torch.distributed.fsdp.")


def gathered_by_fsdp(model: nn.Module) -> dict[str, Any] | None:
    """Returns the state dict of a model inside of ``FullyShardedDataParallel``, gathered; None if it isn't in one."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, fsdp.FullyShardedDataParallel):
        return None
    with fsdp.FullyShardedDataParallel.state_dict_type(model, fsdp.StateDictType.FULL_STATE_DICT):
        return model.state_dict()
