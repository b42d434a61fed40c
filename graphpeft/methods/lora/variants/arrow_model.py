"""Makes a model with Arrow's router from saved adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.adapters.state import Adapter, Modules
from graphpeft.graph.holders import tensor_at
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.methods.lora.linear import LoraLeaf, LoraLinear
from graphpeft.methods.lora.variants.arrow import ArrowConfig, Expert, tensors_of
from graphpeft.model.peft_model import PeftModel
from graphpeft.progress import over
from graphpeft.targeting import targets
from graphpeft.transaction import remember, transaction
from graphpeft.wording import joined

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """Loads LoRA adapters into a model as ``task_0``, ``task_1``, …, and adds a router over them, ``arrow_router``.

    The router has copies of the experts' factors, so it doesn't change when these are trained, and adapters that come
    later are no experts of it. `ArrowConfig.use_gks` loads general adapters as ``gks_0``, …, too, and takes their mean
    from the copies; the experts themselves stay as they are, while PEFT changes them, too.

    Args:
        base_model: The model, without adapters.
        task_specific_adapter_paths: The experts: folders, or repositories on the Hub, also with a folder in them behind
            another slash.
        arrow_config: The options; it gets the names of the adapters.
        general_adapter_paths: The general adapters, likewise; for `ArrowConfig.use_gks` alone.
        **adapter_kwargs: Further arguments for `PeftModel.from_pretrained` and `PeftModel.load_adapter`.

    Returns:
        `base_model` itself.

    Raises:
        ValueError: If there are too few adapters, or they aren't of one rank and the same linear layers, or of more
            than plain LoRA. The model is unchanged then.
        FileNotFoundError: If a file is missing.
        CheckpointError: If a file doesn't fit the model, or is damaged.
        AdaptError: If an adapter can't be on the model.

    Examples:
        >>> for name in ("one", "other"):
        ...     expert = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
        ...     expert.save_pretrained(name)
        >>> model = create_arrow_model(nn.Sequential(nn.Linear(4, 6)), ["one", "other"], ArrowConfig(top_k=1))
        >>> model.active_adapters, list(model.peft_config)
        (['arrow_router'], ['task_0', 'task_1', 'arrow_router'])
    """
    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths is empty; give one adapter at least")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True needs general_adapter_paths; give one at least, or set it False")
    if arrow_config.top_k > len(task_specific_adapter_paths):
        raise ValueError(
            f"top_k={arrow_config.top_k} experts for a token, and there are {len(task_specific_adapter_paths)}; give "
            "more, or choose a smaller top_k"
        )
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    names = [f"task_{number}" for number in range(len(task_specific_adapter_paths))]
    general_names = [f"gks_{number}" for number in range(len(general))]
    with transaction(base_model):
        model: Any = base_model
        paths = [*task_specific_adapter_paths, *general]
        named = list(zip([*names, *general_names], paths, strict=True))
        for name, path in over(named, "loading adapters", "adapters"):
            given = {**_source(path), **adapter_kwargs}
            if name == names[0]:
                PeftModel.from_pretrained(model, adapter_name=name, **given)
            else:
                model.load_adapter(adapter_name=name, **given)
        by_name, modules = known_adapters(model).by_name, modules_of(model)
        _check_alike({name: by_name[name] for name in (*names, *general_names)})
        first = by_name[names[0]]
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = names, general_names
        sites = dict.fromkeys(adapted.site.name for adapted in first.sites)
        rank = first.sites[0].specs["lora_A"].shape[0]
        model.add_adapter(
            ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets.exactly(sites, modules), r=rank)
        )
        _fill(by_name[ROUTER], [by_name[n] for n in names], [by_name[n] for n in general_names], modules_of(model))
        model.set_adapter(ROUTER)
    return model


def _source(path: str) -> dict[str, Any]:
    """Returns the arguments that name an adapter's files: a folder, a repository, or a folder in a repository."""
    parts = Path(path).as_posix().strip("/").split("/")
    if os.path.isdir(path) or len(parts) <= 2:
        return {"model_id": path}
    return {"model_id": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])}


def _check_alike(adapters: dict[str, Adapter]) -> None:
    """Raises ValueError unless all adapters are plain LoRA of the same linear layers, with factors of equal shapes."""
    found: dict[str, dict[str, Any]] = {}
    for name, adapter in adapters.items():
        odd = [adapted.site.label for adapted in adapter.sites if type(adapted.rule) not in (LoraLinear, LoraLeaf)]
        if odd or any(adapted.specs.keys() != {"lora_A", "lora_B"} or adapted.replaced for adapted in adapter.sites):
            where = f" at {joined(odd)}" if odd else ""
            raise ValueError(f"{name!r} is more than LoRA of linear layers{where}, and Arrow mixes products of A and B")
        shapes = {a.site.label: [tuple(spec.shape) for spec in a.specs.values()] for a in adapter.sites}
        ranks = {shape[0][0] for shape in shapes.values()}
        if len(ranks) > 1:
            raise ValueError(f"{name!r} has the ranks {sorted(ranks)}, and Arrow's experts are of one")
        found[name] = shapes
    for name, shapes in found.items():
        if shapes != next(iter(found.values())):
            raise ValueError(f"{name!r} is of other layers or of another rank than {next(iter(found))!r}")


@torch.no_grad()
def _fill(router: Adapter, experts: Sequence[Adapter], general: Sequence[Adapter], modules: Modules) -> None:
    """Gives a router the values of its experts."""
    parts = [{adapted.site.label: adapted for adapted in adapter.sites} for adapter in (*experts, *general)]
    seed = router.config.arrow_config.rng_seed  # pyright: ignore[reportAttributeAccessIssue]
    for adapted in router.sites:
        owner = modules[adapted.site.owner]
        found = []
        for part in parts:
            own = part[adapted.site.label]
            A, B = (tensor_at(owner, own.names[name]) for name in ("lora_A", "lora_B"))
            found.append(Expert(A, B, own.constants["lora_scaling"]))
        for name, tensor in tensors_of(found[: len(experts)], found[len(experts) :], seed).items():
            held = tensor_at(owner, adapted.names[name])
            remember(held)
            held.copy_(tensor)
