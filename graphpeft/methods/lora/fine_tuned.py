"""A fully fine-tuned model as plain LoRA for its base: the best approximation of each weight's difference.

ΔW = W_tuned − W_base ≈ B A            as `conversion` approximates it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.adapters.adapter_names import name_like
from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.plan import Plan
from graphpeft.adapters.state import adapters_of
from graphpeft.graph import overrides
from graphpeft.graph.autocast import in_own_precision
from graphpeft.graph.computed_weights import read_weight
from graphpeft.graph.holders import tensor_at
from graphpeft.graph.paths import join, modules_by_path, unwrapped
from graphpeft.methods.lora.approximation import approximated, by_key, checked
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.wording import joined


def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    rank: float,
    target_modules: Sequence[str] | str = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    progressbar: bool = False,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Returns what full fine-tuning has changed as plain LoRA; both models stay as they are.

    Args:
        base: The model before the fine-tuning, without adapters.
        tuned: The same model after it.
        rank: The rank of all factors, an int; or, as a float in (0, 1], the share of the change's squares that each
            weight's own rank has to reach.
        target_modules: Names of the weights that get factors, as in `LoraConfig`.
        modules_to_save: Names of modules that are taken along whole, such as layers of normalisation.
        progressbar: Whether a bar shows how far it has come.

    Returns:
        The config, whose scale is 1 everywhere, and the tensors by their names in the file.

    Raises:
        TypeError: If `rank` is no number, or a model has adapters.
        ValueError: If a rank is none or larger than a weight, or if the models differ where the adapter changes
            nothing.
        AdaptError: If a target can't be adapted.

    Examples:
        >>> base, tuned = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        >>> _ = tuned.load_state_dict(base.state_dict())
        >>> _ = nn.init.zeros_(tuned[0].weight)
        >>> config, tensors = extract_lora(base, tuned, rank=8, target_modules=["0"])
        >>> model = get_peft_model(base, config)
        >>> set_peft_model_state_dict(model, tensors)
        <All keys matched successfully>
        >>> torch.allclose(model(torch.ones(1, 8)), tuned(torch.ones(1, 8)), atol=1e-5)
        True
    """
    rank, base, tuned = checked(rank), unwrapped(base), unwrapped(tuned)
    for model in (base, tuned):
        if adapters_of(model) is not None:
            raise TypeError(f"a {type(model).__name__} has adapters; merge_and_unload() adds them to its weights")
    there = modules_by_path(tuned)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    saved = None if modules_to_save is None else list(modules_to_save)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, modules_to_save=saved)
    temporary, modules = name_like("converted", ()), modules_of(base)

    def change_of(target: AdaptedSite) -> Tensor:
        site: Any = target.site
        tensors = (read_weight(each[site.owner], site.attribute) for each in (there, modules))
        after, before = (tensor.detach().float() for tensor in tensors if tensor is not None)
        return after - before

    _refuse_others(base, tuned)
    with in_own_precision(modules):
        plan, found = approximated(base, config, change_of, rank, temporary, progressbar)
    _refuse_left(base, tuned, plan)
    for path, names in plan.fully_trained.items():
        for own in names:
            found[path, overrides.override_name(own, temporary)] = tensor_at(there[path], own).detach().clone()
    return config, by_key(plan, found, temporary, modules)


def _refuse_others(base: nn.Module, tuned: nn.Module) -> None:
    """Raises ValueError unless both models have the same tensors by name and shape."""
    before, after = ({name: tuple(tensor.shape) for name, tensor in _tensors(each).items()} for each in (base, tuned))
    odd = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if odd:
        raise ValueError(f"the models aren't one model before and after: {joined(odd, most=5)} differ in name or shape")


def _refuse_left(base: nn.Module, tuned: nn.Module, plan: Plan) -> None:
    """Raises ValueError if there are differences that an adapter with this plan wouldn't make."""
    sites: list[Any] = [adapted.site for adapted in plan.sites]
    made = {site.weight for site in sites}
    made |= {join(path, own) for path, names in plan.fully_trained.items() for own in names}
    after = _tensors(tuned)
    left = [
        name
        for name, tensor in _tensors(base).items()
        if name not in made and not torch.equal(tensor, after[name].to(tensor.device, tensor.dtype))
    ]
    if left:
        raise ValueError(
            f"the models also differ in {joined(left, most=5)}, which LoRA on these targets doesn't change: name the "
            "weights in target_modules, or their modules in modules_to_save"
        )


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
