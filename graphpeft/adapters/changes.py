"""The change that an adapter makes of a weight, and of the bias beside it, as numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Modules
from graphpeft.graph import ops
from graphpeft.graph.autocast import HALVES
from graphpeft.graph.holders import value_at
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.values import loaded, written
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.arguments import Asked, asked_by
from graphpeft.rules.rule import Mergeable, OperationRule, changes_bias
from graphpeft.sites import quantisers
from graphpeft.sites.site import LeafSite, Site
from graphpeft.transaction import remember


def delta(
    adapted: AdaptedSite, modules: Modules, weight: torch.Tensor | None = None, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the change of a site's weight, in the shape in which it is stored.

    From half precision on a CPU it is computed in single precision, as PEFT does: faster and rounded once.
    """
    with loaded(modules[adapted.site.owner], *_read_at_owner(adapted)):
        return _delta(adapted, modules, weight, base)


def _delta(
    adapted: AdaptedSite, modules: Modules, weight: torch.Tensor | None, base: torch.Tensor | None
) -> torch.Tensor:
    asked = asked_by(adapted.rule.delta)
    values = _values(asked, adapted, modules)
    halves = {value.dtype for value in values.values() if _is_half_on_cpu(value)}
    values = {local: value.float() if _is_half_on_cpu(value) else value for local, value in values.items()}
    values |= _weights(adapted, modules, weight, base)
    change = adapted.rule.change({name: values[name] for name in asked.among(values)})
    if change.shape != values["weight"].shape:
        # a fault of the rule, where AdaptError is a refusal
        raise TypeError(
            f"{type(adapted.rule).__name__} at {adapted.site.label}: delta gives a change of shape "
            f"{tuple(change.shape)}, and the weight has {tuple(values['weight'].shape)}"
        )
    return change.to(halves.pop()) if halves else change


def _weights(
    adapted: AdaptedSite, modules: Modules, weight: torch.Tensor | None, base: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    own = _read_weight(adapted, modules) if base is None else base
    return {"weight": own if weight is None else weight, "base": own}


def _is_half_on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype in HALVES


def bias_delta(
    adapted: AdaptedSite,
    modules: Modules,
    weight: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    base_bias: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Returns the change of the bias that a site's operations add, or None if it doesn't change."""
    if not changes_bias(adapted.rule):
        return None
    with contextlib.ExitStack() as stack:
        for path in _changed_modules(adapted):
            names = _read_at_owner(adapted) if path == adapted.site.owner else ()
            stack.enter_context(loaded(modules[path], *names))
        return _bias_delta(adapted, modules, weight, base, base_bias)


def _bias_delta(
    adapted: Any,
    modules: Modules,
    weight: torch.Tensor | None,
    base: torch.Tensor | None,
    base_bias: torch.Tensor | None,
) -> torch.Tensor | None:
    asked, bias = asked_by(adapted.rule.bias_delta), bias_of(adapted, modules)
    values = {**_values(asked, adapted, modules), **_weights(adapted, modules, weight, base)}
    values |= {"bias": bias, "base_bias": bias if base_bias is None else base_bias}
    if bias is not None or not {"bias", "base_bias"} & {*asked.needed}:
        return adapted.rule.bias_change({name: values[name] for name in asked.among(values)})
    is_stack = not adapted.site.is_layer and values["weight"].ndim > 2
    if adapted.site.out_features is None or is_stack or values["weight"].is_meta:
        return None
    # a change that is more than a multiple of the bias has no place to go
    values |= dict.fromkeys(("bias", "base_bias"), values["weight"].new_zeros(adapted.site.out_features))
    change = adapted.rule.bias_change({name: values[name] for name in asked.among(values)})
    return None if change is None or not change.any() else change


def asks_of_weights(rule: Any) -> set[str]:
    """Returns ``weight`` if a rule asks for a weight or bias so far, and ``base`` if it asks for the module's own."""
    if isinstance(rule, Mergeable):
        asks, functions = set[str](), [rule.delta, *([rule.bias_delta] if changes_bias(rule) else [])]
    else:
        # such a rule may multiply its input, and then depends on earlier changes
        asks, functions = {"weight"}, [rule.rewrite if isinstance(rule, OperationRule) else rule.enter]
    of = {"weight": "weight", "bias": "weight", "base": "base", "base_bias": "base", "plain": "base"}
    return asks | {kind for name, kind in of.items() for each in map(Asked, functions) if each.may_be(name)}


def _read_at_owner(adapted: AdaptedSite) -> tuple[str, ...]:
    """Returns the names of the adapter's tensors at a site of which its change is made."""
    return *adapted.names.values(), *adapted.replaced.values()


def _values(asked: Asked, adapted: AdaptedSite, modules: Modules) -> dict[str, Any]:
    """Returns the parameters and constants at a site for which a rule's function asks by the names of its arguments."""
    owner = modules[adapted.site.owner]
    return {local: value_at(owner, name) for local, name in adapted.names.items() if asked.may_be(local)}


def _read_weight(adapted: AdaptedSite, modules: Modules) -> torch.Tensor:
    """Returns the weight that the site's module reads while the adapter acts."""
    if isinstance(adapted.site, LeafSite):
        return quantisers.codes_of(modules[adapted.site.owner]).numbers()
    assert isinstance(adapted.site, Site)
    attribute = adapted.site.attribute
    return own_parameter(modules[adapted.site.owner], adapted.replaced.get(attribute, attribute))


def changing_sites(modules: Modules, adapter: Adapter) -> list[Any]:
    """Returns the sites whose change merging adds to a weight; what is tied to one of these changes with it."""
    return [adapted for adapted in adapter.weight_sites if not _is_tied(adapted, modules)]


def _is_tied(adapted: AdaptedSite, modules: Modules) -> bool:
    """Returns whether a site shares its weight, too, with the site with which it shares its parameters."""
    site: Any = adapted.site
    if site.tied_to is None or not adapted.shared:
        return False
    # somebody may have untied them since
    own, other = (own_parameter(modules[path], site.attribute) for path in (site.owner, site.tied_to))
    return memory_of(own) == memory_of(other)


def memory_of(tensor: torch.Tensor) -> Any:
    """Returns the address of a tensor's first number; the object's identity if it has no address."""
    # two parameters may lie at one place: `load_state_dict(model.state_dict(), assign=True)` makes such
    return (tensor.device, tensor.data_ptr()) if _has_address(tensor) else id(tensor)


def lies_in(tensor: torch.Tensor) -> Any:
    """Returns the address of a tensor's storage; the object's identity if it has no address."""
    return (tensor.device, tensor.untyped_storage().data_ptr()) if _has_address(tensor) else id(tensor)


def _has_address(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
    return is_plain and tensor.numel() > 0


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two tensors that lie in the same storage have a number in common."""
    if memory_of(one) == memory_of(other):
        return True
    if lies_in(one) != lies_in(other):
        return False
    starts = [tensor.storage_offset() * tensor.element_size() for tensor in (one, other)]
    sizes = [_extent(tensor) for tensor in (one, other)]
    if starts[0] + sizes[0] <= starts[1] or starts[1] + sizes[1] <= starts[0]:
        return False
    return bool((_bytes_of(one) & _bytes_of(other)).any())


def _extent(tensor: torch.Tensor) -> int:
    """Returns how many bytes lie between the first number of a tensor and the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns which bytes of its storage a tensor has."""
    taken = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    taken.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
    return taken


def changed_places(modules: Modules, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yields the path of the module, and the name, of each weight and bias that merging changes."""
    for adapted in changing_sites(modules, adapter):
        yield adapted.site.owner, adapted.site.attribute
        if bias_delta(adapted, modules) is not None:
            if bias_of(adapted, modules) is None:
                raise AdaptError(
                    f"{adapted.site.label} has no bias, into which the change of one could be merged; give the layer a "
                    "bias before you adapt it, or leave the adapter active"
                )
            yield bias_place(adapted)


def bias_place(adapted: AdaptedSite) -> tuple[str, str]:
    """Returns the path of the module, and the name, of the bias that a site's operations add."""
    assert isinstance(adapted.site, Site)
    path, _, name = str(adapted.site.bias).rpartition(".")
    return path, name


def bias_of(adapted: AdaptedSite, modules: Modules) -> torch.Tensor | None:
    """Returns the bias that a site's operations add, as its module reads it; None if it has none, or none any more."""
    if not isinstance(adapted.site, Site) or adapted.site.bias is None:
        return None
    path, name = bias_place(adapted)
    return modules[path]._parameters.get(name)


def _changed_modules(adapted: AdaptedSite) -> tuple[str, ...]:
    """Returns the paths of the modules that own the weight of a site, and the bias beside it."""
    owner, bias = adapted.site.owner, getattr(adapted.site, "bias", None)
    return (owner,) if bias is None else tuple(dict.fromkeys((owner, bias_place(adapted)[0])))


@contextlib.contextmanager
def there_to_write(adapted: AdaptedSite, modules: Modules) -> Iterator[None]:
    """Lets the weight of a site, and the bias beside it, be there to be written, if they are offloaded."""
    with contextlib.ExitStack() as stack:
        for path in _changed_modules(adapted):
            stack.enter_context(written(modules[path]))
        yield


def add_change(
    adapted: AdaptedSite, modules: Modules, weight: torch.Tensor, base: torch.Tensor, base_bias: torch.Tensor | None
) -> None:
    """Adds the change of a weight, and of the bias beside it; arguments as for `bias_delta`."""
    change = delta(adapted, modules, weight, base)
    # beside the weight of before, as in the graph
    bias_change = bias_delta(adapted, modules, weight, base, base_bias)
    remember(weight)
    # where the weight itself changes, as the graph adds it; else the sum alone is rounded
    weight += change.to(weight.dtype) if adapted.site.op is ops.Weight else change
    bias = bias_of(adapted, modules)
    if bias is not None and bias_change is not None:
        remember(bias)
        bias += bias_change.to(bias.dtype)
