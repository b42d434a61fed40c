"""Overrides: tensors that a module reads in place of its own.

An override is an adapter's copy of a bias or of a fully trained module's tensor, or a residual weight: the frozen
weight minus the part that an adapter trains. The module's own tensors stay under their own names. While an adapter is
active, ``module.weight`` returns its override ``module.<adapter>.weight`` to every reader: the module's own code,
another module, or a graph. An adapter may override only some rows of a table: then ``module.weight`` returns the table
with ``module.token_adapter.trainable_tokens_delta.<adapter>``, PEFT's name, in place of these rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from graphpeft._torch import without_compiler
from graphpeft.graph import in_place
from graphpeft.graph.holders import name_at, place_of, tensor_at, value_at
from graphpeft.graph.hosts.sharding import in_all, is_asked_by, is_managed
from graphpeft.graph.own_tensors import STAND_INS, look_around

Names = tuple[str, ...]

Rows = tuple[tuple[str, tuple[int, ...]], ...]
"""Names of tensors that hold rows of a table, each with the rows' indices."""


def tensors_of(module: nn.Module) -> Names:
    """Returns the names of the parameters and buffers that `module` itself owns."""
    return tuple(name for kind in (module._parameters, module._buffers) for name, t in kind.items() if t is not None)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Returns a module's own parameter, or an adapter's there, even where an override is read in its place."""
    holder, own = place_of(module, name)
    parameter = holder._parameters[own]
    assert parameter is not None
    return parameter


def refusal(module: nn.Module) -> str | None:
    """Returns the reason why `module` can't read overrides, or None."""
    if isinstance(module, nn.RNNBase):
        return None  # before each call it puts what its attributes give into its list
    own = {id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None}
    for name, value in module.__dict__.items():
        if isinstance(value, list | tuple) and any(id(part) in own for part in value):
            return f"a {type(module).__name__} keeps its parameters in self.{name} too, where no other can stand in"
    return None


def create(own: torch.Tensor) -> torch.Tensor:
    """Returns a new override of a module's parameter or buffer: a copy of it."""
    copied = own.detach().clone()
    return nn.Parameter(copied, own.is_floating_point()) if isinstance(own, nn.Parameter) else copied


def read(module: nn.Module, others: dict[str, str], rows: Rows = ()) -> None:
    """Makes `module` read overrides in place of its own tensors."""
    in_place.put_on(module, _layer(tuple(others.items()), rows))
    if _HOOK in vars(module):
        _show_own(vars(module)[_HOOK])


def read_own(module: nn.Module) -> None:
    """Makes `module` read its own tensors."""
    in_place.take_off(module, "tensors")


def with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Returns an object like `module` with other tensors in place of its own; `module` stays unchanged.

    The object has the original class of `module` and serves one call of a forward.
    """
    other = nn.Module.__new__(in_place.original_class(module))
    parameters = {name: tensor for name, tensor in tensors.items() if name in module._parameters}
    buffers = {name: tensor for name, tensor in tensors.items() if name in module._buffers}
    other.__dict__ = {
        **module.__dict__,
        "_parameters": {**module._parameters, **parameters},
        "_buffers": {**module._buffers, **buffers},
    }
    return other


def own_and_override(module: nn.Module, names: Names, adapter: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields each tensor of `module` among `names` with its override."""
    for name in names:
        yield tensor_at(module, name), tensor_at(module, override_name(name, adapter))


def override_name(name: str, adapter: str) -> str:
    """Returns the name of the override of the tensor `name`."""
    return name_at(adapter, name)


def rows(adapter: str) -> str:
    """Returns the name of the tensor that holds an adapter's rows of a weight."""
    return name_at("trainable_tokens_delta", adapter, "token_adapter")


def put_rows(table: torch.Tensor, indices: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """Returns a copy of `table` with `values` in the rows at `indices`."""
    return table.index_copy(0, in_all(torch.tensor(indices, device=table.device), table), values.to(table))


@functools.lru_cache(maxsize=1024)
def _layer(pairs: tuple[tuple[str, str], ...], rows: Rows) -> in_place.Layer:
    names = dict(pairs)

    own_names = ("weight",) if rows else tuple(names)

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if name == _HOOK:
            _refuse_tying(module, value, names)
            _show_own(value)
            # it has taken the flag of the override for that of the module's own
            for own in own_names:
                if (parameter := module._parameters.get(own)) is not None:
                    parameter.requires_grad_(False)
        if name in own_names and is_managed(module):
            # FSDP has deleted the module's own before, and sets a parameter between calls and a tensor during one
            vars(module).pop(name, None)
            held = module._parameters if isinstance(value, nn.Parameter) else vars(module)
            held[name] = value
            return
        if rows and name in module._parameters and isinstance(value, nn.Parameter):
            # `fully_shard` sets it before the rows are sharded alike, and `register_parameter` would read both
            module._parameters[name] = value
            return
        # a parameter goes where `named_parameters()` has the name, as whatever shards or quantises a model means it
        is_redirected = name in names and not isinstance(value, nn.Parameter)
        holder, own = place_of(module, names[name]) if is_redirected else (module, name)
        # that of a class, too, which somebody has derived since
        original: Any = getattr(type(holder), "_graphpeft_original", type(holder))
        original.__setattr__(holder, own, value)

    readers = {own: functools.partial(_read, own, other) for own, other in pairs}
    if rows:
        readers["weight"] = functools.partial(_read_with_rows, rows)
    namespace: dict[str, Any] = {
        own: property(reader, fdel=functools.partial(_delete_own, own)) for own, reader in readers.items()
    }
    namespace |= {"__setattr__": assign, "_save_to_state_dict": _save, "_load_from_state_dict": _load}
    namespace[STAND_INS] = readers
    return in_place.Layer("tensors", (), namespace, (_layer, (pairs, rows)))


_HOOK = "_hf_hook"
"""The attribute of a module that has accelerate's hook, which moves and exchanges its tensors around each call."""


def _refuse_tying(module: nn.Module, hook: Any, names: Mapping[str, str]) -> None:
    """Raises RuntimeError if accelerate takes an override for what is tied to other modules, and would tie it there."""
    hooks = getattr(hook, "hooks", (hook,))
    tied = {pointer for each in hooks for pointer in getattr(each, "tied_params_map", None) or ()}
    read = [own for own, other in names.items() if tensor_at(module, other).data_ptr() in tied]
    if read:
        raise RuntimeError(
            f"{' and '.join(read)} of a {in_place.original_class(module).__name__} is tied to another module's, and an "
            "adapter reads its own copy in place of it, which accelerate would give to both: dispatch the model before "
            "you adapt it. accelerate.hooks.remove_hook_from_submodules(model) takes off what hooks there are now"
        )


def _show_own(hook: Any) -> None:
    """Lets a hook of accelerate find a module's own tensors, where reading ``module.weight`` gives an override."""
    hook.__class__ = _showing_own(type(hook))


@functools.cache
def _showing_own(cls: type) -> type:
    if hasattr(cls, _SHOWS_OWN):
        return cls
    methods = {name: _on_own(getattr(cls, name)) for name in ("pre_forward", "post_forward", "detach_hook")}
    return type(cls.__name__, (cls,), {**methods, _SHOWS_OWN: True, "__module__": cls.__module__})


_SHOWS_OWN = "_graphpeft_shows_own"


def _on_own(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    @without_compiler("accelerate moves tensors, which no graph can hold")
    def on_own(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with in_place.without(module, "tensors"):
            return method(hook, module, *args, **kwargs)

    return on_own


def _save(module: nn.Module, *args: Any) -> None:
    # a class that saves its own tensors itself may read them as attributes
    itself: Any = with_tensors(module, {})
    itself._save_to_state_dict(*args)


def _load(module: nn.Module, *args: Any, **options: Any) -> None:
    # a state dict has the module's own tensors, and with `assign` sets them
    with in_place.without(module, "tensors"):
        module._load_from_state_dict(*args, **options)


def _read(own: str, other: str, module: nn.Module) -> torch.Tensor:
    if is_managed(module) and is_asked_by(_FSDP):
        return _own(module, own)
    if own in module._parameters and not torch.compiler.is_compiling():
        look_around(module, own, module._parameters[own])
    return value_at(module, other)


def _read_with_rows(rows: Rows, module: nn.Module) -> torch.Tensor:
    table = _own(module, "weight")
    if is_managed(module) and is_asked_by(_FSDP):
        return table
    for name, indices in rows:
        table = put_rows(table, indices, value_at(module, name))
    return table


_FSDP = "torch.distributed.fsdp"
"""It reads ``module.weight`` between calls to see whether that was exchanged, and means the module's own."""


def _own(module: nn.Module, name: str) -> torch.Tensor:
    """Returns the module's own parameter, or the tensor that FSDP has there during a call."""
    held: dict[str, Any] = module._parameters if name in module._parameters else vars(module)
    if name not in held:
        raise AttributeError(name)
    return held[name]


def _delete_own(name: str, module: nn.Module) -> None:
    # nn.Module deletes a parameter before it looks for a property
    del vars(module)[name]
