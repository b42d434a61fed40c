"""Where an adapter's tensors and numbers live: on a module of their own inside each module that it adapts.

``q_proj.default.lora_A`` is the tensor `lora_A` of the adapter ``default`` at `q_proj`. So names of tensors have the
adapter's name as a component of their path, as in PEFT, and all of an adapter at a module comes and goes as one object.
A holder may be in a group, and may have parts, which have tensors: ``prompt_encoder.default.embedding.weight``. Groups
and parts are holders, too. Code that goes through a model's own modules leaves holders out.

trl finds a policy's tensors by ``.default.`` in their names. Nothing calls a holder, so accelerate's hooks never
exchange its tensors for others, which no optimizer would know.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from graphpeft._torch import can_take_data
from graphpeft.graph.hosts.sharding import distributed_as, is_sharded
from graphpeft.transaction import delete_item, set_item


class Holder(nn.Module):
    """The tensors of one adapter at a module, as its parameters and buffers; its numbers are plain attributes.

    Holders may have tensors in common, as several modules may have a tied parameter. A holder holds holders alone.
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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads a state dict; one that is assigned gives its tensors' data to those here, which others may have."""
        before = dict(self._parameters), dict(self._buffers)
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_shared(*before)

    def _keep_shared(self, parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
        """Keeps a tensor that holders share one tensor where others have come in its places."""
        held: Any
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


class HolderGroup(Holder):
    """A group of several adapters' holders at a module, or of a tensor of each, by the adapters' names.

    Attributes:
        in_slots: The adapters whose holders graphs read, by the names of their slots.
    """

    _graphpeft_method = "adapters"

    def __init__(self) -> None:
        super().__init__()
        self.in_slots: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(vars(self).get("in_slots", {}).get(name, name))

    def keys(self) -> list[str]:
        """Returns the names of the adapters."""
        return [*self._modules, *self._parameters, *self._buffers]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, adapter: object) -> bool:
        return adapter in self.keys()

    def __getitem__(self, adapter: str) -> Any:
        if adapter not in self:
            raise KeyError(adapter)
        return getattr(self, adapter)


def holder_for(module: nn.Module, method: str, options: str) -> Holder:
    """Returns an empty holder for an adapter at `module`."""
    wrapping: Any = sys.modules.get("torch.distributed.fsdp.wrap")
    if wrapping is not None:
        # what FSDP wraps is whole in its own call alone, and no holder is called
        wrapping.size_based_auto_wrap_policy.EXCLUDE_WRAP_MODULES.add(Holder)
    holder = Holder()
    vars(holder).update(training=module.training, _graphpeft_method=method, _graphpeft_options=options)
    return holder


def put_on(module: nn.Module, path: str, holder: Holder | None) -> None:
    """Gives `module` a holder at a path, and the groups around it that aren't there; None makes these alone."""
    *groups, own = path.split(".")
    for group in groups:
        if group not in module._modules:
            _hold(module, group, HolderGroup())
        module = _inside(module, group)
    if holder is not None:
        _hold(module, own, holder)


def _hold(module: nn.Module, name: str, holder: Holder) -> None:
    # without those that other code has taken away
    there = vars(module).get(HOLDERS, frozenset()) & module._modules.keys()
    set_item(vars(module), HOLDERS, there | {name})
    set_item(module._modules, name, holder)


HOLDERS = "_graphpeft_holders"
"""The attribute of a module with the names of its holders, and of groups of them."""


def take_off(module: nn.Module, path: str) -> None:
    """Takes the holder or the tensor at a path off `module`, and groups that are empty then; all may be gone."""
    *groups, own = path.split(".")
    around = [module]
    for group in groups:
        inner = around[-1]._modules.get(group)
        if inner is None:
            return
        around.append(inner)
    for held in (around[-1]._parameters, around[-1]._buffers):
        delete_item(held, own)
    _let_go(around[-1], own)
    for outer, group in reversed(list(zip(around, groups, strict=False))):
        inner = _inside(outer, group)
        if not (inner._modules or inner._parameters or inner._buffers):
            _let_go(outer, group)


def _let_go(module: nn.Module, name: str) -> None:
    if name in module._modules:
        delete_item(module._modules, name)
        names = vars(module).get(HOLDERS, frozenset()) - {name}
        set_item(vars(module), HOLDERS, names) if names else delete_item(vars(module), HOLDERS)


def _inside(module: nn.Module, name: str) -> nn.Module:
    inner = module._modules[name]
    assert inner is not None
    return inner


def name_at(adapter: str, name: str, group: str = "") -> str:
    """Returns the name, at the module that is adapted, of what an adapter's holder has as `name`; "" is the holder."""
    return ".".join(filter(None, (group, adapter, name)))


def place_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that itself has the attribute `name` of `module`, and its name there."""
    *path, own = name.split(".")
    held: Any = module
    for inner in path:
        held = held._modules[inner]
    return held, own


def new_place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the same as `place_of` for an adapter's attribute, whose holder gets the parts that it lacks."""
    *path, own = name.split(".")
    held: Any = module
    for inner in path:
        if inner not in held._modules:
            held._modules[inner] = holder_for(held, "part", "")
        held = held._modules[inner]
    return held, own


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


def parameter_at(module: nn.Module, name: str) -> nn.Parameter | None:
    """Returns the parameter `name` of `module`, which may be an adapter's; None if there is none."""
    *path, own = name.split(".")
    held: Any = module
    for inner in path:
        held = held._modules.get(inner)
        if held is None:
            return None
    return held._parameters.get(own)


def has_tensor(module: nn.Module, name: str) -> bool:
    """Returns whether `module` has the parameter or buffer `name`, which may be an adapter's."""
    *path, own = name.split(".")
    for inner in path:
        found = module._modules.get(inner)
        if found is None:
            return False
        module = found
    return module._parameters.get(own) is not None or module._buffers.get(own) is not None


def has_place(module: nn.Module, name: str) -> bool:
    """Returns whether `module` has a holder, or a tensor in a group of holders, at the path `name`."""
    first, *path = name.split(".")
    # a module of the model's own may have the adapter's name
    if first not in module._modules or not isinstance(module._modules[first], Holder):
        return False
    held: Any = module._modules[first]
    for inner in path:
        held = next((of[inner] for of in (held._modules, held._parameters, held._buffers) if inner in of), None)
        if held is None:
            return False
    return True


def has_holders(module: nn.Module) -> bool:
    """Returns whether `module` has holders, or groups of them."""
    return HOLDERS in vars(module)


def has_own_modules(module: nn.Module) -> bool:
    """Returns whether `module` has submodules beside the holders of adapters."""
    return bool(own_modules(module))


def tree_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yields ``module.modules()`` without holders."""
    waiting, seen = [module], set[nn.Module]()
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            yield each
            waiting += [child for _, child in reversed(own_modules(each)) if child is not None]


def own_modules(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """Returns the submodules of `module` by name, without holders.

    A layer may have a hundred holders. So their names are kept where they come and go, and they aren't gone through
    where the module's own come first, or there are none.
    """
    inner: Mapping[str, Any] = module._modules
    names: Any = module.__dict__.get(HOLDERS, ())
    if not inner or (len(inner) == len(names) and next(reversed(inner)) in names and next(iter(inner)) in names):
        return []
    if len(inner) >= len(names) > 0:
        first = list(itertools.islice(inner, len(inner) - len(names)))
        # other code may have taken holders away, or added modules behind them
        if names.isdisjoint(first) and names <= inner.keys():
            return [(name, inner[name]) for name in first]
    return [(name, child) for name, child in inner.items() if not isinstance(child, Holder)]


def all_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that `module` has itself and those that adapters have there, with their names."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for outer, child in module._modules.items():
        if isinstance(child, Holder):
            for name, parameter in all_parameters(child):
                yield f"{outer}.{name}", parameter


def adapters_at(module: nn.Module) -> Iterator[str]:
    """Yields the names of the adapters that have a holder at `module`, or in a group there."""
    for name, child in module._modules.items():
        if isinstance(child, HolderGroup):
            yield from (*child._parameters, *child._buffers, *adapters_at(child))
        elif isinstance(child, Holder):
            yield name


def holders_of(module: nn.Module) -> list[nn.Module]:
    """Returns the holders at `module`, with their groups and parts."""
    return [each for child in module._modules.values() if isinstance(child, Holder) for each in child.modules()]


def without_holders(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Leaves out holders among modules and their paths."""
    return ((path, module) for path, module in modules if not isinstance(module, Holder))


def distribute_adapters(module: nn.Module, weight: Any) -> None:
    """Distributes the tensors of adapters at `module` as its weight is; those that several adapters share stay one."""
    for holder in holders_of(module):
        held_there: tuple[Any, ...] = (holder._parameters, holder._buffers)
        for held in held_there:
            for name, tensor in held.items():
                if tensor is not None and not is_sharded(tensor):
                    known = _BECOME.get(tensor)
                    held[name] = _BECOME[tensor] = distributed_as(tensor, weight) if known is None else known


_BECOME: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The tensors in place of others that further holders may have, too."""


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
