"""The tensors of adapters: makes them with their first values or a file's, and says which of them are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.empty_tensors import fill
from graphpeft.adapters.plan import AdaptError, Plan, dtype_of_adapter
from graphpeft.adapters.state import Adapter, Modules, Tensors
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph import overrides
from graphpeft.graph.holders import place_of, tensor_at
from graphpeft.graph.hosts.sharding import distributed_as, equal_in_all, have_shards, is_tensor_parallel, reshard
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.values import loaded, value_of, written
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import Rule
from graphpeft.rules.weight_reader import WeightReader
from graphpeft.sites.site import CallSite, Site
from graphpeft.transaction import remember, set_item

_CHUNK = 2**20
"""How many words are multiplied at a time, since the products take memory."""

_SPREAD = 0x1E3779B97F4A7C15
"""The distance of the factors of words, which is large, so that all bits of a sum depend on each word."""


def new_tensors(plan: Plan, name: str, modules: Modules, values: Tensors | None) -> Tensors:
    """Returns the tensors of the adapter of `plan`, which no module has yet; they require grad if they are trained."""
    made = _site_tensors(plan, modules, values) | _whole_tensors(plan, name, modules, values)
    made |= _row_tensors(plan, name, modules, values)
    if plan.config.inference_mode:
        for tensor in made.values():
            tensor.requires_grad_(False)
    return _distributed(plan, modules, made)


def _distributed(plan: Plan, modules: Modules, made: Tensors) -> Tensors:
    """Returns new tensors as tensor parallelism distributes what they are beside; one that is shared remains one."""
    if not have_shards(modules.values()):
        return made
    beside = {
        (adapted.site.owner, name): adapted.site.beside for adapted in plan.sites for name in adapted.names.values()
    }
    at_boundaries = {
        (adapted.site.owner, name)
        for adapted in plan.sites
        if isinstance(adapted.site, CallSite)
        for name in adapted.names.values()
    }
    found: dict[int, torch.Tensor] = {}
    for place, tensor in made.items():
        is_rows = place[1] == overrides.rows(plan.report.adapter)
        path, own = beside.get(place, (place[0], "weight" if is_rows else place[1].rpartition(".")[2]))
        weight = {**modules[path]._parameters, **modules[path]._buffers}.get(own)
        if is_tensor_parallel(modules[path], weight) and id(tensor) not in found:
            # a module is given whole tensors, which are to be equal in all processes
            like = equal_in_all if place in at_boundaries else distributed_as
            found[id(tensor)] = like(tensor, weight)
    return {place: found.get(id(tensor), tensor) for place, tensor in made.items()}


def first_values(plan: Plan, modules: Modules) -> Tensors:
    """Draws the first values of the tensors at the sites of `plan`, and puts them nowhere."""
    return _site_tensors(plan, modules, None)


@torch.no_grad()
def _site_tensors(plan: Plan, modules: Modules, values: Tensors | None) -> Tensors:
    made: Tensors = {}
    config = plan.config.with_weights([adapted.site for adapted in plan.sites], WeightReader(modules))
    for adapted in plan.sites:
        site, names, specs = adapted.site, adapted.names, adapted.specs
        beside, attribute = site.beside
        drawn: Mapping[str, torch.Tensor] = {}
        replacing: Mapping[str, torch.Tensor] = {}
        shared = {local: made[place] for local, place in adapted.shared.items()} if adapted.shared else {}
        try:
            with loaded(modules[beside]):
                device = _device(modules[beside]._parameters.get(attribute), values)
                module = modules[site.owner if isinstance(site, Site) else beside]
                unsaved = [local for local, spec in specs.items() if not spec.is_saved]
                if values is None or adapted.replaced or (unsaved and not _completes(adapted)):
                    _redraw(adapted, config, modules, device)
                    drawn, replacing = _first_values(adapted, config, module, device, shared)
                if values is not None and _completes(adapted):
                    drawn = _completed(adapted, config, module, device, values, shared)
                elif values is not None:
                    drawn = {
                        local: values[site.owner, names[local]] if spec.is_saved else drawn[local]
                        for local, spec in specs.items()
                        if local not in shared or not spec.is_saved
                    }
        except NotImplementedError as error:
            if not getattr(modules[beside]._parameters.get(attribute), "is_meta", False):
                raise
            raise AdaptError(
                f"what the adapter has at {site.label} follows from the numbers of the weight there, which is on the "
                "meta device and has none; load the model's weights, and then the adapter"
            ) from error
        for own, tensor in replacing.items():
            made[site.owner, adapted.replaced[own]] = nn.Parameter(tensor, requires_grad=False)
        for local, tensor in drawn.items():
            if local in shared:
                shared[local].copy_(tensor)
                continue
            spec = specs[local]
            dtype = spec.dtype or adapted.dtype
            if tensor.dtype != dtype or tensor.device != device:
                tensor = tensor.to(device, dtype)
            if tensor.is_inference():
                tensor = tensor.clone()  # as what a file's reader has made in inference mode, which can't be trained
            made[site.owner, names[local]] = nn.Parameter(tensor, spec.is_trained) if spec.is_parameter else tensor
        for local, tensor in shared.items():
            made[site.owner, names[local]] = tensor
    return made


def _completed(
    adapted: AdaptedSite,
    config: PeftConfig,
    module: nn.Module,
    device: torch.device,
    values: Tensors,
    shared: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Returns a file's values of a site's parameters, with those that follow from them; but no other site's."""
    empty = torch.device("meta" if device.type == "meta" else "cpu")
    filled = {local: _empty(spec, empty) for local, spec in adapted.specs.items() if not spec.is_saved}
    saved = [local for local, spec in adapted.specs.items() if spec.is_saved and local not in shared]
    filled |= {**{local: values[adapted.site.owner, adapted.names[local]] for local in saved}, **shared}
    if device.type != "meta":
        _complete(adapted, config, module, filled)
    return {local: filled[local] for local in adapted.specs if local not in shared}


def _first_values(
    adapted: AdaptedSite,
    config: PeftConfig,
    module: nn.Module,
    device: torch.device,
    shared: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the first values of a site's parameters, and the tensors that its module reads in place of its own.

    Tensors of another site have values already, which the rule may let be.
    """
    own = {name: own_parameter(module, name) for name in adapted.replaced} if adapted.replaced else {}
    if device.type == "meta":
        drawn = {local: _empty(spec, device) for local, spec in adapted.specs.items()}
        return drawn, {name: torch.empty_like(tensor) for name, tensor in own.items()}
    # drawn on the CPU and in the default dtype wherever the weight is, as PEFT does: equal seeds, equal values
    drawn = {
        local: _empty(spec) if local not in shared else shared[local].to("cpu", spec.dtype or torch.get_default_dtype())
        for local, spec in adapted.specs.items()
    }
    given = adapted.rule.initialise(drawn, adapted.site, config, module) or {}
    _refuse_misshapen(adapted, drawn)
    replacing = {name: given[name].to(tensor.device, tensor.dtype) for name, tensor in own.items()} if own else {}
    if adapted.site.dtype == torch.get_default_dtype():
        return drawn, replacing
    # through the weight's dtype, in which PEFT has them for a moment
    return {
        local: tensor if adapted.specs[local].dtype is not None else tensor.to(adapted.site.dtype)
        for local, tensor in drawn.items()
    }, replacing


def _redraw(adapted: AdaptedSite, config: PeftConfig, modules: Modules, device: torch.device) -> None:
    """Draws the first values of the sites that a site names for that, and throws them away."""
    for other in () if device.type == "meta" else adapted.site.redrawn:
        rule: Any = config.rule_for(other, adapted.dtype).at_site(other, adapted.dtype)
        discarded = {local: _empty(spec) for local, spec in rule.parameters(other, config).items()}
        with loaded(modules[other.owner]):
            rule.initialise(discarded, other, config, modules[other.owner])


def _refuse_misshapen(adapted: AdaptedSite, drawn: Mapping[str, torch.Tensor]) -> None:
    """Raises AdaptError if a rule's `initialise` has exchanged a tensor for one of another shape, or added one."""
    for local, tensor in drawn.items():
        wanted = adapted.specs[local].shape if local in adapted.specs else None
        if tensor.shape != wanted:
            raise AdaptError(
                f"{type(adapted.rule).__name__} at {adapted.site.label}: initialise makes {local} of shape "
                f"{tuple(tensor.shape)}, and its spec says {wanted and tuple(wanted)}; fill what it is given in place"
            )


def _empty(spec: ParameterSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)


def _device(weight: torch.Tensor | None, values: Tensors | None) -> torch.device:
    """Returns the device of the tensors beside a weight; a file's values stay in memory if the weight has none yet."""
    # a model without any parameter, such as a quantised one, tells no device
    device = torch.get_default_device() if weight is None else weight.device
    return torch.device("cpu") if device.type == "meta" and values is not None else device


def _whole_tensors(plan: Plan, name: str, modules: Modules, values: Tensors | None) -> Tensors:
    """Returns copies of tensors that are fully trained; what is tied has one copy, if the config keeps it tied."""
    made: Tensors = {}
    of_tied: dict[int, torch.Tensor] = {}
    for path, names in plan.fully_trained.items():
        for own in names:
            place = path, overrides.override_name(own, name)
            tensor = tensor_at(modules[path], own)
            tied = of_tied.get(id(tensor)) if plan.config.keeps_tied else None
            if tied is None:
                with loaded(modules[path]):
                    source = tensor_at(modules[path], own)
                    if source.is_meta and values is not None:
                        given = values[place].to(source.dtype)
                        source = nn.Parameter(given, False) if isinstance(source, nn.Parameter) else given
                    tied = overrides.create(source)
            made[place] = tied
            of_tied[id(tensor)] = made[place]
            if values is not None:
                made[place].data.copy_(values[place])
    return made


def _row_tensors(plan: Plan, name: str, modules: Modules, values: Tensors | None) -> Tensors:
    """Returns the rows that are trained; those that follow another module have its very tensor."""
    made: Tensors = {}
    for path, rows in plan.rows.items():
        if rows.leader == path:
            place = path, overrides.rows(name)
            with loaded(modules[path]):
                table = own_parameter(modules[path], "weight")
                if values is None:
                    first = table.detach()[list(rows.indices)]
                    plan.config.initialise_rows(first)
                else:
                    first = values[place].to(_device(table, values))
            first = first.to(dtype_of_adapter(table.dtype, plan.autocast))
            made[place] = nn.Parameter(first.clone() if first.is_inference() else first)
    for path, rows in plan.rows.items():
        made[path, overrides.rows(name)] = made[rows.leader, overrides.rows(name)]
    return made


@torch.no_grad()
def overwrite(modules: Modules, adapter: Adapter, name: str, values: Tensors) -> None:
    """Gives tensors of an adapter other values, and tensors of the model's own, which are put back when it goes."""
    reshard(modules.values())
    values = fill(modules, adapter, name, values)
    of_adapter = set(adapter.tensor_names(name))
    for place, value in values.items():
        owner, copied = place_of(modules[place[0]], place[1])[0], None
        with written(owner):
            tensor = tensor_at(modules[place[0]], place[1])
            if place not in of_adapter and place not in adapter.overwritten:
                copied = tensor.clone()
                set_item(adapter.overwritten, place, copied)
            remember(tensor, copied)
            tensor.copy_(value)


def complete(modules: Modules, adapter: Adapter, name: str) -> None:
    """Lets an adapter whose tensors have got a file's values have the others that follow from these."""
    config = adapter.config.with_weights([adapted.site for adapted in adapter.sites], WeightReader(modules))
    for adapted in adapter.sites:
        if not _completes(adapted):
            continue
        (beside, _), site = adapted.site.beside, adapted.site
        with loaded(modules[beside]):
            module = modules[site.owner if isinstance(site, Site) else beside]
            own = {local: value_of(modules[site.owner], adapted.names[local]).clone() for local in adapted.specs}
            _complete(adapted, config, module, own)
        unsaved = [local for local, spec in adapted.specs.items() if not spec.is_saved]
        overwrite(modules, adapter, name, {(site.owner, adapted.names[local]): own[local] for local in unsaved})


def is_completed(adapter: Adapter) -> bool:
    """Returns whether some tensors of an adapter follow from those that its file has."""
    return any(map(_completes, adapter.sites))


def _completes(adapted: AdaptedSite) -> bool:
    return type(adapted.rule).complete is not Rule.complete


@torch.no_grad()
def _complete(adapted: AdaptedSite, config: PeftConfig, module: nn.Module, own: dict[str, torch.Tensor]) -> None:
    try:
        adapted.rule.complete(own, adapted.site, config, module)
    except ValueError as error:
        raise CheckpointError(f"the adapter's file doesn't fit {adapted.site.label}: {error}") from error


def is_same(own: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether a tensor of a model has the values of a saved one already."""
    if hasattr(own, "__tensor_flatten__"):
        # most of PyTorch's functions aren't there for quantised tensors
        names, _ = own.__tensor_flatten__()  # type: ignore[attr-defined]
        return type(own) is type(value) and all(is_same(getattr(own, name), getattr(value, name)) for name in names)
    return not own.is_meta and torch.equal(own.cpu(), value.to("cpu", own.dtype))


def fingerprint(tensor: torch.Tensor) -> int | None:
    """Returns a number that is another one if a bit of a tensor is, or two parts of it change places; None for meta.

    It is the sum, modulo 2^64, of all words times odd numbers of their own: a change of one word always shows.
    """
    if tensor.is_meta:
        return None
    words = tensor.reshape(-1).contiguous().view(torch.uint8)
    # a copy, since a part of other memory may begin anywhere
    words = torch.cat([words, words.new_zeros(-len(words) % 8)]).view(torch.int64)
    factors = torch.arange(len(words[:_CHUNK]), device=words.device) * _SPREAD * 2 + 1
    sums = torch.stack([(chunk * factors[: len(chunk)]).sum() for chunk in words.split(_CHUNK)])
    return sum(part * (2 * i + 1) for i, part in enumerate(sums.tolist())) % 2**64


def count_of_numbers(tensor: torch.Tensor) -> int:
    """Returns how many numbers a tensor stands for: two for each byte of weights that bitsandbytes has packed."""
    is_packed = type(tensor).__name__ == "Params4bit"
    return tensor.numel() * tensor.element_size() * 2 if is_packed else tensor.numel()
