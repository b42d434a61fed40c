"""Adapters that compiled code runs with any lower rank and any scale: factors with room, and scales in tensors.

    W' = W + s · [B 0] [A; 0]            zeros as further ranks change nothing, and compiled code knows shapes alone

In files, factors have their own rank. Training leaves the zeros as they are, since each is multiplied by another one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapter, Modules
from graphpeft.graph.holders import place_of
from graphpeft.graph.paths import unwrapped
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.parameter_spec import FileForm, ParameterSpec, RankAxis
from graphpeft.sites.site import Site
from graphpeft.transaction import set_attribute, set_item, transaction, undone_by


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,  # noqa: ARG001
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Lets `hotswap_adapter` exchange adapters of other ranks and scales without compiling a model again.

    Call it once the first adapter is there, and before ``torch.compile``. The factors get room for a rank, filled with
    zeros, which changes no output; scales become tensors. Files have an adapter's own rank. An adapter that is swapped
    in can lack some of the adapted weights, whose factors are then zero. One with a higher rank, or with further
    weights, is swapped in, too, and compiled anew.

    Args:
        model: An adapted model; all of its adapters are prepared that have factors.
        target_rank: The highest rank of all adapters that will be swapped in; None leaves the ranks as they are.
        config: Accepted for compatibility with PEFT; the config of an adapter keeps the rank that its file has.
        check_compiled: The reaction to a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        AdaptError: If the model has no adapter with factors, one with a higher rank, or is compiled, or a module that
            an adapter adapts was replaced since. The model is as it was.
        ValueError: If `check_compiled` is anything else.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> prepare_model_for_compiled_hotswap(model, target_rank=8)
        >>> model[0].default.lora_A.shape
        torch.Size([8, 4])
        >>> get_peft_model_state_dict(model)["base_model.model.0.lora_A.weight"].shape
        torch.Size([2, 4])
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled is {check_compiled!r}; choose 'error', 'warn' or 'ignore'")
    if target_rank is not None and (type(target_rank) is not int or target_rank < 1):
        raise AdaptError(f"target_rank is {target_rank!r}; choose a whole number from 1 on, or None")
    is_compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if is_compiled and check_compiled != "ignore":
        problem = "the model is compiled, and what it is compiled for changes now; prepare it before you compile it"
        if check_compiled == "error":
            raise AdaptError(problem)
        warnings.warn(problem, PeftWarning, stacklevel=2)
    model = unwrapped(model)
    adapters = {name: adapter for name, adapter in known_adapters(model).by_name.items() if _factors(adapter)}
    if not adapters:
        raise AdaptError(
            f"the {type(model).__name__} has no adapter whose factors have a rank; prepare it once its first "
            "adapter of LoRA is there"
        )
    for name, adapter in adapters.items():
        refuse_missing(modules_of(model), adapter, name)
        for adapted in adapter.sites:
            reason = None if target_rank is None else _refusal(adapted, target_rank)
            if reason is not None:
                raise AdaptError(f"{adapted.site.label} can't have room for target_rank={target_rank}: {reason}")
    with transaction(model):
        for adapter in adapters.values():
            make_swappable(modules_of(model), adapter, target_rank or 0)


def make_swappable(modules: Modules, adapter: Adapter, rank: int) -> None:
    """Gives an adapter's factors room for a rank where they can have it, and puts its scales into tensors.

    This is for inside a transaction.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    sites = [with_room(adapted, rank) for adapted in adapter.sites]
    for adapted, before in zip(sites, adapter.sites, strict=True):
        owner = modules[adapted.site.owner]
        for local, spec in adapted.specs.items():
            if spec is not before.specs[local] and spec.rank is not None:
                holder, own = place_of(owner, adapted.names[local])
                tensor = holder._parameters[own]
                assert tensor is not None
                if tensor not in made:  # what sites share is made once
                    made[tensor] = nn.Parameter(spec.rank.resized(tensor.detach(), spec.shape), tensor.requires_grad)
                set_item(holder._parameters, own, made[tensor])
        for name in adapted.rule.scales:
            holder, own = place_of(owner, adapted.names[name])
            value = vars(holder)[own]
            if not isinstance(value, torch.Tensor):
                # on the CPU, so that it is a number for kernels of any device, and in the precision that it had
                set_item(vars(holder), own, torch.tensor(value, dtype=torch.float64))
    adapter.exchange_sites(sites)
    set_attribute(adapter, "padded_to", max(rank, adapter.padded_to or 0))


def _factors(adapter: Adapter) -> list[tuple[AdaptedSite, ParameterSpec]]:
    return [(adapted, spec) for adapted in adapter.sites for spec in adapted.specs.values() if spec.rank is not None]


def _rank(adapted: AdaptedSite, spec: ParameterSpec) -> int:
    assert spec.rank is not None
    return spec.shape[spec.rank.axis] // spec.rank.blocks * _groups(adapted)


def _groups(adapted: AdaptedSite) -> int:
    return adapted.site.groups if isinstance(adapted.site, Site) else 1


def with_room(adapted: AdaptedSite, rank: int) -> AdaptedSite:
    """Returns an adapted site whose factors have room for a rank, or the site itself if they can't."""
    if _refusal(adapted, rank) is not None:
        return adapted
    specs = {local: _widened(spec, rank // _groups(adapted)) for local, spec in adapted.specs.items()}
    return adapted._replace(specs=specs)


def _refusal(adapted: AdaptedSite, rank: int) -> str | None:
    """Returns the reason why the factors at a site can't have room for a rank, or None."""
    own = max((_rank(adapted, spec) for spec in adapted.specs.values() if spec.rank is not None), default=None)
    if own is None:
        return None
    if own > rank:
        return f"the adapter has the rank {own} there, which is higher; choose the highest of all ranks"
    if rank % _groups(adapted):
        return f"its features are in {_groups(adapted)} groups, which don't divide it; choose a multiple"
    return None


def _widened(spec: ParameterSpec, rank: int) -> ParameterSpec:
    """Returns a spec with room for a rank in each block, whose form in files has none."""
    if spec.rank is None:
        return spec
    shape = tuple(spec.rank.blocks * rank if axis == spec.rank.axis else size for axis, size in enumerate(spec.shape))
    if shape == tuple(spec.shape):
        return spec
    stored = spec.shape if spec.form is None else spec.form.shape
    form = FileForm(tuple(stored), _Narrowed(spec.rank, spec.shape, spec.form), _Widened(spec.rank, shape, spec.form))
    return spec._replace(shape=shape, form=form)


@dataclass(frozen=True)
class _Narrowed:
    """Makes of a factor with room the one for a file, which has its own rank."""

    rank: RankAxis
    shape: tuple[int, ...]
    form: FileForm | None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        own = self.rank.resized(tensor, self.shape)
        return own if self.form is None else self.form.pack(own)


@dataclass(frozen=True)
class _Widened:
    """Makes of a file's factor one with room."""

    rank: RankAxis
    shape: tuple[int, ...]
    form: FileForm | None

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        return self.rank.resized(stored if self.form is None else self.form.unpack(stored), self.shape)


def fitting(adapted: AdaptedSite, like: AdaptedSite) -> AdaptedSite:
    """Returns a site of a new adapter with room as another adapter's has it there, if its factors have lower ranks."""
    ranks = [_rank(like, spec) for spec in like.specs.values() if spec.rank is not None]
    return with_room(adapted, max(ranks)) if ranks else adapted


def without_effect(adapted: AdaptedSite) -> AdaptedSite | None:
    """Returns an adapted site whose factors are all zero, and in no file; None if zeros would have an effect there."""
    are_factors = all(spec.rank is not None for spec in adapted.specs.values())
    if not are_factors or adapted.replaced or adapted.shared:
        return None
    return adapted._replace(specs={local: spec._replace(is_saved=False) for local, spec in adapted.specs.items()})


def set_number(held: dict[str, Any], own: str, value: Any) -> None:
    """Sets a number of an adapter, in its tensor if it is in one; inside a transaction."""
    now = held[own]
    if not isinstance(now, torch.Tensor):
        if now != value:
            set_item(held, own, value)
    elif now.item() != value:
        undone_by(now.fill_, now.item())
        now.fill_(value)


def same_specs(one: Mapping[str, ParameterSpec], other: Mapping[str, ParameterSpec]) -> bool:
    """Returns whether tensors are the same in a model, whatever they are in files."""

    def in_model(specs: Mapping[str, ParameterSpec]) -> dict[str, ParameterSpec]:
        return {local: spec._replace(form=None, is_saved=True) for local, spec in specs.items()}

    return in_model(one) == in_model(other)
