"""Any adapter that changes weights, as plain LoRA: the best approximation of its change of each weight.

The same numbers as PEFT's ``tuners/lora/conversion.py``, which converts linear layers alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphpeft.adapters import changes
from graphpeft.adapters.adapter_names import name_like
from graphpeft.adapters.adapting import known_adapter, known_adapters, modules_of
from graphpeft.adapters.merging import with_originals
from graphpeft.adapters.state import Adapter, Modules, adapters_of
from graphpeft.files.atomic_files import Staging
from graphpeft.graph import overrides
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.paths import unwrapped
from graphpeft.methods.lora.approximation import approximated, by_key, by_weight_of, checked, plan_of
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.rule import changes_bias
from graphpeft.stacks import peft_files
from graphpeft.targeting import targets
from graphpeft.wording import joined


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,  # noqa: ARG001
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns an adapter as plain LoRA, for programs that read nothing else; the model stays as it is.

    Tensors of `modules_to_save` and rows of `trainable_token_indices` are taken along as they are.

    Args:
        model: An adapted model.
        rank: The rank of all factors, an int; or, as a float in (0, 1], the share of the change's squares that each
            site's own rank has to reach.
        adapter_name: The name of the adapter.
        progressbar: Whether a bar shows how far it has come.
        compile_kwargs: Accepted for compatibility with PEFT, and not used: nothing here is compiled.

    Returns:
        The config, whose scale is 1 everywhere, and the tensors by their names in the file.

    Raises:
        TypeError: If `rank` is no number, the model has no adapter that changes weights, or the adapter changes one in
            a way that is no sum.
        ValueError: If a rank is none or larger than a weight, or if the adapter trains biases or has taken a part of
            the weights.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=4, use_dora=True, target_modules=["0"]))
        >>> config, tensors = convert_to_lora(model, rank=2)
        >>> config.r, config.use_dora, sorted(tensors)
        (2, False, ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight'])
    """
    rank = checked(rank)
    model = unwrapped(model)
    adapter = _source(model, adapter_name)
    modules, state = modules_of(model), known_adapters(model)
    temporary = name_like("converted", state.by_name)
    with with_originals(modules, state):
        config = _config_for(adapter, modules)
        sources = by_weight_of(adapter.sites)
        adapts = by_weight_of(plan_of(model, config, temporary).sites)
        if odd := sources.keys() ^ adapts.keys():
            raise TypeError(f"LoRA adapts other weights: {joined(sorted(odd))} differ; leave the adapter as it is")

        def change_of(target: AdaptedSite) -> Tensor:
            site: Any = target.site
            return changes.delta(sources[site.weight], modules)

        plan, found = approximated(
            model,
            config,
            change_of,
            rank,
            temporary,
            progressbar,
        )
        config.layer_replication = _replication(adapter.config)
        for path, names in plan.fully_trained.items():
            for own in names:
                copied = tensor_at(modules[path], overrides.override_name(own, adapter_name))
                found[path, overrides.override_name(own, temporary)] = copied.detach().clone()
        for path in plan.rows:
            rows = tensor_at(modules[path], overrides.rows(adapter_name)).detach().clone()
            found[path, overrides.rows(temporary)] = rows
        return config, by_key(plan, found, temporary, modules)


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter as plain LoRA, see `convert_to_lora`.

    Args:
        path: The folder, which is made if it isn't there.
        model: An adapted model.
        rank: The rank of all factors, or the share of the squares that each site's own rank has to reach.
        adapter_name: The name of the adapter.
        progressbar: Whether a bar shows how far it has come.
        compile_kwargs: Accepted for compatibility with PEFT, and not used.

    Raises:
        TypeError: As `convert_to_lora`.
        ValueError: As `convert_to_lora`.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=4, use_dora=True, target_modules=["0"]))
        >>> save_as_lora("plain", model, rank=0.99)
        >>> LoraConfig.from_pretrained("plain").use_dora
        False
    """
    save_converted(path, convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs))


def save_converted(path: str | os.PathLike[str], converted: tuple[LoraConfig, Mapping[str, Tensor]]) -> None:
    """Writes what `convert_to_lora` returned to the folder `path`, whole or not at all."""
    config, tensors = converted
    with Staging(Path(path)) as staging:
        peft_files.write(staging.folder, config, tensors, safe_serialization=True)
        staging.put()


def _source(model: nn.Module, name: str) -> Adapter:
    """Returns the adapter to convert."""
    if adapters_of(model) is None:
        raise TypeError(f"the {type(model).__name__} has no adapters, of which one could be LoRA")
    adapter = known_adapter(model, name)
    if not adapter.sites:
        raise TypeError(
            f"{name!r} is a {adapter.config.method} adapter that can't be LoRA: it trains modules or rows as they are"
        )
    if not adapter.changes_weights:
        reasons = (
            f"{each.site.label or 'the model'}: {each.unmergeable}" for each in adapter.sites if each.unmergeable
        )
        raise TypeError(
            f"{name!r} is a {adapter.config.method} adapter that can't be LoRA: {next(reasons, 'no weights')}"
        )
    if adapter.took_product or adapter.replaced:
        raise ValueError(
            f"{name!r} has taken a part of the weights, so its change alone isn't what it has learned; convert it with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…) first"
        )
    if adapter.config.trained_biases != "none" or any(changes_bias(adapted.rule) for adapted in adapter.sites):
        raise ValueError(f"{name!r} changes biases, for which plain LoRA has no place; leave it as it is")
    if not adapter.is_change_of_weights:
        raise ValueError(f"{name!r} rounds the sums with its weights, which are quantised; merge it instead")
    if type(adapter.config) is LoraConfig and not adapter.config.use_dora:
        warnings.warn(
            f"{name!r} is already a LoRA adapter: converting it gives the same with another rank",
            PeftWarning,
            stacklevel=4,
        )
    return adapter


def _config_for(adapter: Adapter, modules: Modules) -> LoraConfig:
    """Returns the config that names an adapter's sites, and what it trains fully."""
    source: Any = adapter.config
    sites = [adapted.site for adapted in by_weight_of(adapter.sites).values()]
    layers = [site.name for site in sites if site.is_layer]
    others = [targets.own_parameter_entry(site.weight) for site in sites if not site.is_layer]
    return LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=targets.exactly(dict.fromkeys(layers), modules),
        target_parameters=others or None,
        fan_in_fan_out=bool(layers) and all(getattr(site, "transposed", False) for site in sites),
        modules_to_save=source.modules_to_save,
        trainable_token_indices=getattr(source, "trainable_token_indices", None) or None,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
    )


def _replication(source: PeftConfig) -> list[tuple[int, int]] | None:
    ranges = source.replicated_layers
    return None if ranges is None else [(first, behind) for first, behind in ranges]
