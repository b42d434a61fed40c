"""Makes one adapter of several. How it is done is the method's; here is what holds for every method."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping, Sequence

import torch

from graphpeft.adapters import adapter_names, changes
from graphpeft.adapters.empty_tensors import refuse_empty
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.merging import with_originals
from graphpeft.adapters.plan import AdaptError, Plan
from graphpeft.adapters.state import Adapter, Adapters, Modules, Tensors
from graphpeft.adapters.tensors import first_values
from graphpeft.graph import overrides
from graphpeft.graph.autocast import in_own_precision
from graphpeft.graph.holders import as_number, tensor_at, value_at
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join
from graphpeft.graph.values import loaded
from graphpeft.rules.combination import Combination, Part
from graphpeft.rules.config import PeftConfig
from graphpeft.wording import joined, number_of


def check_names(adapters: Adapters, names: Sequence[str], weights: Sequence[float]) -> None:
    """Checks that there is an adapter, and a weight, for each name."""
    if isinstance(names, str):
        raise TypeError(f"adapters is the text {names!r}; pass a list of names, [{names!r}]")
    if not names:
        raise AdaptError("no adapters to combine were named")
    if len(names) != len(weights):
        raise AdaptError(
            f"{number_of(len(names), 'adapter')} named, with "
            f"{number_of(len(weights), 'weight')}; give one weight for each"
        )
    for weight in weights:
        if not isinstance(weight, numbers.Real):
            raise TypeError(f"weights has {weight!r}, which is no number")
        if not math.isfinite(weight):
            raise AdaptError(f"weights has {weight!r}; give finite numbers")
    if len(set(names)) < len(names):
        raise AdaptError("an adapter is named twice; name it once, with the sum of its weights")
    unknown = adapter_names.unknown(names, adapters.by_name)
    if unknown is not None:
        raise AdaptError(f"{unknown}; the model has {sorted(adapters.by_name)}")


def combined_config(adapters: Adapters, names: Sequence[str], how: Combination) -> PeftConfig:
    """Returns the config of the adapter that combines others."""
    sources = [adapters.by_name[name] for name in names]
    methods = sorted({source.config.method for source in sources})
    if len(methods) > 1:
        raise AdaptError(f"adapters of several methods, {' and '.join(methods)}, can't be combined")
    for name, source in zip(names, sources, strict=True):
        if source.padded_to:
            raise AdaptError(
                f"the factors of {name!r} have room for other adapters' ranks, so it can't be combined; save it, load "
                "it anew under another name, and combine that"
            )
        if source.replaced:
            raise AdaptError(
                f"{name!r} has taken a part of {joined(list(source.replaced))}, so it can't be combined with others "
                "yet; save it with path_initial_model_for_weight_conversion, and load that in its place"
            )
    _refuse_shared_copies(names, sources)
    sites = {adapted.site.name: adapted.site for source in sources for adapted in source.sites}
    try:
        return sources[0].config.combined([source.config for source in sources], list(sites.values()), how)
    except ValueError as error:
        raise AdaptError(f"can't combine {joined([repr(name) for name in names])}: {error}") from error


def _refuse_shared_copies(names: Sequence[str], sources: Sequence[Adapter]) -> None:
    trained: dict[tuple[str, str], str] = {}
    for name, source in zip(names, sources, strict=True):
        for path, own_names in source.fully_trained.items():
            for own in own_names:
                first = trained.setdefault((path, own), name)
                if first != name:
                    raise AdaptError(
                        f"{first!r} and {name!r} both fully train {join(path, own)}, and copies of a tensor can't be "
                        "combined; train it in one of them"
                    )


@torch.no_grad()
def combined_values(
    modules: Modules, adapters: Adapters, weights: Mapping[str, float], plan: Plan, how: Combination
) -> Tensors:
    """Returns the tensors of the adapter that combines others, by their places in the model."""
    sources = {name: adapters.by_name[name] for name in weights}
    for name, source in sources.items():
        refuse_missing(modules, source, name)
        refuse_empty(modules, source, name)
    parts = _parts(modules, sources, weights)
    planned = {(adapted.site.region, adapted.site.label) for adapted in plan.sites}
    if planned != parts.keys():
        odd = [name or "the model" for _, name in planned ^ parts.keys()]
        raise AdaptError(f"the combined adapter would not adapt what its sources do: they differ in {joined(odd)}")
    # PEFT draws the new adapter's first values before it overwrites them, so chance is the same afterwards
    with with_originals(modules, adapters):
        values = first_values(plan, modules)
    with in_own_precision(modules):
        for adapted in plan.sites:
            if adapted.shared:
                continue
            try:
                made = plan.config.combine(adapted, parts[adapted.site.region, adapted.site.label], how, len(weights))
            except ValueError as error:
                raise AdaptError(f"can't combine {joined([repr(name) for name in weights])}: {error}") from error
            values |= {(adapted.site.owner, adapted.names[local]): tensor for local, tensor in made.items()}
    return values | _copies(modules, sources, plan) | _rows(modules, sources, weights, plan)


def _parts(
    modules: Modules, sources: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[tuple[str, str], list[Part]]:
    parts: dict[tuple[str, str], list[Part]] = {}
    for name, source in sources.items():
        for adapted in source.sites:
            owner = modules[adapted.site.owner]
            part = Part(
                adapted,
                weights[name],
                {local: value_at(owner, adapted.names[local]).detach() for local in adapted.specs},
                {local: as_number(value_at(owner, adapted.names[local])) for local in adapted.constants},
                functools.partial(changes.delta, adapted, modules),
            )
            parts.setdefault((adapted.site.region, adapted.site.label), []).append(part)
    return parts


def _rows(modules: Modules, sources: Mapping[str, Adapter], weights: Mapping[str, float], plan: Plan) -> Tensors:
    """Returns the rows of tables that sources train, each with the weighted sum of their changes."""
    wanted = {
        (path, index) for source in sources.values() for path, rows in source.rows.items() for index in rows.indices
    }
    found = {(path, index) for path, rows in plan.rows.items() for index in rows.indices}
    if wanted != found:
        odd = [f"row {index} of {path}" for path, index in sorted(wanted ^ found)]
        raise AdaptError(
            f"the combined adapter would not train what its sources do: they differ in {joined(odd)}; name embeddings "
            "alike in all of them"
        )
    values: Tensors = {}
    for path, rows in plan.rows.items():
        with loaded(modules[path]):
            base = own_parameter(modules[path], "weight").detach()[list(rows.indices)].float()
        combined = base.clone()
        for name, source in sources.items():
            own = source.rows.get(path)
            for place, index in enumerate(own.indices if own is not None else ()):
                at = rows.indices.index(index)
                row = tensor_at(modules[path], overrides.rows(name)).detach()[place]
                combined[at] += weights[name] * (row.to(base.device, base.dtype) - base[at])
        values[path, overrides.rows(plan.report.adapter)] = combined
    return values


def _copies(modules: Modules, sources: Mapping[str, Adapter], plan: Plan) -> Tensors:
    """Returns what the sources have for tensors that are fully trained; where none has it, the tensor itself."""
    values: Tensors = {}
    for path, names in plan.fully_trained.items():
        for own in names:
            holder = next((name for name, source in sources.items() if own in source.fully_trained.get(path, ())), None)
            attribute = own if holder is None else overrides.override_name(own, holder)
            tensor = tensor_at(modules[path], attribute)
            values[path, overrides.override_name(own, plan.report.adapter)] = tensor.detach()
    return values
