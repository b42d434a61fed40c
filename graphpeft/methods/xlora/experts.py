"""The experts of X-LoRA: LoRA adapters in files, read for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.adapters import checkpoint, merged_weights
from graphpeft.adapters.adapting import modules_of, planned, refuse
from graphpeft.adapters.plan import AdaptError, Plan
from graphpeft.adapters.state import Adapter, adapters_of
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.methods.lora.config import LoraConfig
from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.rules.peft_names import PeftType
from graphpeft.stacks.reading import read_for
from graphpeft.wording import shown


class Factors(NamedTuple):
    """An expert's factors at a layer.

    Attributes:
        A: Of shape (r, in).
        B: Of shape (out, r).
        scaling: The scale of their product.
    """

    A: Tensor
    B: Tensor
    scaling: float


class Expert(NamedTuple):
    """A LoRA adapter that was read for a model.

    Attributes:
        config: Its config, filled in for the model.
        sites: Its sites, each with its rule, in the order in which first values are drawn.
        factors: Its factors by the sites' labels.
    """

    config: LoraConfig
    sites: Sequence[AdaptedSite]
    factors: Mapping[str, Factors]

    def draw(self, module: nn.Module) -> None:
        """Draws the first values that the adapter would have, and throws them away, as PEFT does."""
        for adapted in self.sites:
            drawn = {local: torch.empty(spec.shape) for local, spec in adapted.specs.items()}
            adapted.rule.initialise(drawn, adapted.site, self.config, module)


class Experts:
    """The experts of an adapter, in their order; copies of its config share them."""

    def __init__(self, every: Sequence[Expert]) -> None:
        self.every = tuple(every)

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        return self

    def ranks(self, label: str) -> tuple[int, ...]:
        """Returns the rank of each expert at a site; 0 for one that doesn't adapt it."""
        return tuple(len(expert.factors[label].A) if label in expert.factors else 0 for expert in self.every)

    def scales(self, label: str) -> tuple[float, ...]:
        """Returns the scale of each expert at a site; that of another one for an expert that doesn't adapt it."""
        there = [expert.factors[label].scaling for expert in self.every if label in expert.factors]
        return tuple([e.factors[label].scaling if label in e.factors else there[0] for e in self.every])

    def side_by_side(self, label: str) -> tuple[Tensor, Tensor]:
        """Returns the factors of all experts at a site as those of one product, without scales."""
        found = [expert.factors[label] for expert in self.every if label in expert.factors]
        return torch.cat([each.A for each in found]), torch.cat([each.B for each in found], dim=1)

    def numbers(self, label: str) -> Tensor:
        """Returns the number of the expert of each rank of that product, (ranks,)."""
        return torch.repeat_interleave(torch.tensor(self.ranks(label)))


def read_expert(model: nn.Module, path: str, name: str, example_inputs: ExampleInputs | None) -> Expert:
    """Returns the LoRA adapter in a folder, or in a repository on the Hub, read for a model that stays as it is."""
    try:
        saved = read_for(model, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"expert {name!r} of adapters: {error}; give the config with the paths of the experts, as "
            "from_pretrained(…, config=config)"
        ) from error
    config = saved.config
    if config.method != PeftType.LORA:
        raise AdaptError(
            f"expert {name!r}, {shown(path)}, is a {config.method} adapter, and X-LoRA weighs those of LORA"
        )
    config.inference_mode = False  # its dropout acts in training, though it isn't trained
    try:
        plan = planned(model, config.fitted_to(saved.tensors), f"expert_{name}", example_inputs)
        refuse(plan)
        factors = _factors(model, plan, saved.tensors)
    except (AdaptError, CheckpointError) as error:
        raise type(error)(f"expert {name!r}, {shown(path)}: {error}") from error
    saved.refuse_two_saves(path)
    assert isinstance(plan.config, LoraConfig)
    return Expert(plan.config, plan.sites, factors)


def _factors(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Returns the factors in a file by the labels of their sites."""
    adapter = Adapter.of(plan)
    odd = [adapted.site.label for adapted in plan.sites if adapted.specs.keys() != {"lora_A", "lora_B"}]
    if odd or plan.fully_trained or plan.rows or adapter.replaced or adapter.took_product:
        what = f", as at {odd[0]}" if odd else ""
        raise AdaptError(
            f"it is more than products of A and B{what}, which is all that X-LoRA weighs; train an expert without "
            "modules_to_save, trainable_token_indices, bias, lora_bias, use_dora and initialisations from the weights"
        )
    state = adapters_of(model)
    originals = merged_weights.Originals(model, state)
    values = checkpoint.fitted(adapter, plan.report.adapter, modules_of(model), originals, tensors)
    places = {
        adapted.site.label: [(adapted.site.owner, adapted.names[local]) for local in ("lora_A", "lora_B")]
        for adapted in plan.sites
    }
    if len(values) > 2 * len(places):
        raise AdaptError("its file has the model's own tensors, too; save it with save_embedding_layers=False")
    found = {}
    for adapted in plan.sites:
        A, B = (values[place] for place in places[adapted.site.label])
        found[adapted.site.label] = Factors(A, B, adapted.constants["lora_scaling"])
    return found
