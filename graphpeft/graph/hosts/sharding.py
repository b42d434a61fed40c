"""Modules whose tensors are sharded over processes: each has a part, and a ``DTensor`` says what the whole is.

``fully_shard`` puts whole tensors in their places for each call alone. Here they are gathered for code that reads or
writes values otherwise. All processes have to do that, and in the same order, since gathering needs each of them.

A tensor that comes after ``fully_shard`` can't be trained, since its gradient isn't summed. Under tensor parallelism,
an adapter's tensors are sharded along the dimensions that they share with the weight.

``fully_shard`` and ``replicate`` also set a module's class, to ``class FSDPLinear(FSDPModule, Linear)``, which doesn't
change what the module computes. It is the module's outermost class, and adapters change the class under it. During an
export, code that reads a submodule gets an object of ``class Linear(AttrProxy, Linear)``, which has the very attributes
of the submodule.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft._torch import elements_in_flat_shard, sharded_parameter_behind, storage_key, version, without_compiler
from graphpeft.transaction import at_end_of, remember


def is_sharded(tensor: Any) -> bool:
    """Returns whether a tensor, or a class of tensors, is a ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def have_shards(modules: Iterable[nn.Module]) -> bool:
    """Returns whether tensors of some modules themselves are sharded."""
    if _DTENSOR not in sys.modules:
        return False  # nobody has one
    held = [of for module in modules for of in (module._parameters, module._buffers) if of]
    return any(map(is_sharded, {type(tensor) for of in held for tensor in of.values()}))


_DTENSOR = "torch.distributed.tensor"


def whole(tensor: Any) -> torch.Tensor:
    """Returns a tensor with all its values, gathered from all processes if it is sharded."""
    if not is_sharded(tensor):
        return tensor
    # a process group gathers on its own device, where fully_shard's CPUOffloadPolicy doesn't leave parameters
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


@contextlib.contextmanager
def gathered(owners: Iterable[nn.Module], is_written: bool = False) -> Iterator[None]:
    """Lets modules have their own tensors whole for the duration of the context."""
    with contextlib.ExitStack() as stack:
        exchanged: list[tuple[Any, torch.Tensor, int]] = []
        for owner in owners:
            tensors_of: Any = (owner._parameters, owner._buffers)
            for held in tensors_of:
                for name, tensor in held.items():
                    if is_sharded(tensor):
                        at_end_of(stack, held.__setitem__, name, tensor)
                        full = whole(tensor)
                        if isinstance(tensor, nn.Parameter):
                            full = nn.Parameter(full, tensor.requires_grad)
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


@torch.no_grad()
def scale(parameter: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiplies a trained parameter by factors, in place, in a forward.

    FSDP gathers a copy of the parameter for a forward, and frees it afterwards. So the shard of the process is
    multiplied, too.

    Args:
        parameter: The parameter, as the forward reads it.
        factors: The factors, in its shape.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _scale_gathered(parameter, factors)
    else:
        parameter.mul_(factors)


@without_compiler("FSDP's shards are looked for by the storages of tensors")
def _scale_gathered(parameter: torch.Tensor, factors: torch.Tensor) -> None:
    flat, sharded = elements_in_flat_shard(parameter), sharded_parameter_behind(parameter)
    if flat is not None:
        kept, elements = flat
        if storage_key(kept) != storage_key(parameter):
            kept.mul_(factors.reshape(-1)[elements].to(kept))
        # by `data`: after a write that autograd sees, it refuses all views of the gathered parameters
        parameter.data.mul_(factors)
        return
    if sharded is not None:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = sharded.device_mesh
        everywhere = DTensor.from_local(factors, mesh, [Replicate()] * mesh.ndim, run_check=False)
        kept = sharded.detach().to_local()
        kept.mul_(everywhere.redistribute(placements=sharded.placements).to_local().to(kept))
    parameter.mul_(factors)


def is_managed(module: nn.Module) -> bool:
    """Returns whether `fully_shard` or FSDP shards the tensors that `module` had then, and sums up gradients."""
    return "_is_fsdp_managed_module" in module.__dict__


def is_partitioned(tensor: Any) -> bool:
    """Returns whether DeepSpeed's ZeRO-3 has taken a parameter's values into parts of its own."""
    return hasattr(tensor, "ds_id") and tensor.numel() == 0


def lacking_values(
    module: nn.Module, sizes: Mapping[str, Sequence[int]], holders: Iterable[nn.Module] = ()
) -> str | None:
    """Returns why the tensors of `module` and of an adapter there can't be read, if this process has a part of them.

    Args:
        module: The module.
        sizes: The shapes of its tensors that are known, by their names.
        holders: The holders of the adapter's tensors.
    """
    held = [t for each in (module, *holders) for t in each._parameters.values() if t is not None]
    if any(map(is_partitioned, held)):
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


_READS = "graphpeft.adapters.reads"
"""Its methods of adapted layers hand on what they are asked."""


def is_asked_by(package: str) -> bool:
    """Returns whether the function that asks this was called by code of a package, such as a part of PyTorch's.

    Where a wrapper of PyTorch's passes an attribute of its module on, it is who asks the wrapper.
    """
    if torch.compiler.is_compiling():
        return False
    frame: Any = sys._getframe(2)
    name = frame.f_globals.get("__name__", "")
    while name == _READS or (frame.f_code.co_name == "__getattr__" and name.startswith("torch.")):
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
    return name == package or name.startswith(f"{package}.")


def gathered_by_fsdp(model: nn.Module) -> dict[str, Any] | None:
    """Returns the state dict of a model inside of ``FullyShardedDataParallel``, gathered; None if it isn't in one."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, fsdp.FullyShardedDataParallel):
        return None
    with fsdp.FullyShardedDataParallel.state_dict_type(model, fsdp.StateDictType.FULL_STATE_DICT):
        return model.state_dict()


def distributed_as(tensor: torch.Tensor, weight: Any) -> torch.Tensor:
    """Returns an adapter's tensor distributed as the weight beside it is by tensor parallelism, from the first process.

    Along a dimension that the two have in common it is sharded alike, and else each process has all of it: of LoRA's
    factors, B where the weight's rows are sharded, and A where its columns are.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def placement(own: Any) -> Any:
        for dim in (0, -1) if isinstance(own, Shard) else ():
            is_sharded_there = own.dim % weight.ndim == dim % weight.ndim
            if is_sharded_there and tensor.shape[dim] == weight.shape[dim]:
                return Shard(dim % tensor.ndim)
        return Replicate()

    placed = distribute_tensor(tensor.detach(), weight.device_mesh, [placement(own) for own in weight.placements])
    return nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else placed


def equal_in_all(tensor: torch.Tensor, weight: Any) -> torch.Tensor:
    """Returns a tensor with the values of the first of the processes over which a weight is sharded."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = weight.device_mesh
    values: Any = distribute_tensor(tensor.detach(), mesh, [Replicate()] * mesh.ndim)
    return (
        nn.Parameter(values.to_local(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values.to_local()
    )


def in_all(constant: torch.Tensor, tensor: Any) -> torch.Tensor:
    """Returns a tensor that all processes have made alike, in a form in which one can compute with `tensor` and it."""
    if not is_sharded(tensor):
        return constant
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    return DTensor.from_local(constant, mesh, [Replicate()] * mesh.ndim, run_check=False)


def is_tensor_parallel(module: nn.Module, tensor: Any) -> bool:
    """Returns whether a tensor of `module` is a part of a whole in each call, too."""
    return is_sharded(tensor) and not is_managed(module)


_MODULES = ("torch.distributed.fsdp", "torch.distributed._composable")
"""The Python modules of the classes that PyTorch puts in front."""


def under_shards(cls: type) -> type:
    """Returns the class from which one was derived to distribute or export a module; the class itself if it wasn't."""
    # nearly all classes have one base
    while len(cls.__bases__) == 2 and (_distributes(cls) or _exports(cls)):
        cls = cls.__bases__[1]
    return cls


def over_shards(cls: type, under: type) -> type:
    """Returns the class that is to `under` what `cls` is to the class under it; equal arguments give the same class."""
    if not _distributes(cls):
        return under
    front, inner = cls.__bases__[0], over_shards(cls.__bases__[1], under)
    if inner is cls.__bases__[1]:
        return cls
    made = _MADE.get((front, inner))
    if made is None:
        own: dict[str, Any] = {"__deepcopy__": vars(cls)["__deepcopy__"], "__module__": cls.__module__}
        made = _MADE[front, inner] = type(cls.__name__, (front, inner), own)
    return made


_MADE: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()
"""The classes in use that were made here."""


def _distributes(cls: type) -> bool:
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__.startswith(_MODULES) and "__deepcopy__" in vars(cls)


def _exports(cls: type) -> bool:
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__ == "torch.fx.experimental.proxy_tensor"
