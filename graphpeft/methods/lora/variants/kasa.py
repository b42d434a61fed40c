"""KaSA: LoRA with singular values of its own between A and B, on a weight without its smallest ones.

    y' = W̃ x + b + s · (dropout(x) Aᵀ ⊙ d) Bᵀ        W̃ = Σ σᵢ uᵢ vᵢᵀ over all but the r smallest σ of W

The module reads W̃ in place of W while the adapter acts, and its own weight stays as it is. Source: Wang et al., "KaSA:
Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071; the same numbers as PEFT's
``KasaLinearVariant`` in ``tuners/lora/variants.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.graph.holders import tensor_at
from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.init.initialisation import RANDOM, weight_of
from graphpeft.methods.lora.variants.around import AroundLora
from graphpeft.rules.options import NotNegative, check_options
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.sites.site import Site


@dataclass
class KasaConfig:
    """The options of KaSA; the names, defaults and meanings are PEFT's.

    Both are weights of the penalty that `kasa_loss` returns, for a training loop to add to its loss.

    Source: Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071.

    Attributes:
        beta: The weight of the singular values' squares.
        gamma: The weight of how far A and B are from orthogonal.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"], kasa_config=KasaConfig(beta=0.01))
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)[0].default.lora_diag.shape
        torch.Size([2])
    """

    beta: NotNegative = 1e-4
    gamma: NotNegative = 1e-3

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Kasa(AroundLora):
    """The branch of a linear layer, and its truncated weight."""

    def check(self, site: Site, config: Any) -> str | None:
        """Refuses what LoRA refuses, a weight that is stored as (in, out), and ranks that leave nothing of it."""
        reason = super().check(site, config)
        if reason is not None:
            return reason
        if self.lora.flipped:
            return "it is a Conv1D, and kasa_config is for nn.Linear, as in PEFT"
        if config.init_lora_weights not in RANDOM:
            return f"init_lora_weights={config.init_lora_weights!r} changes A or the weight, as kasa_config does"
        if site.call is not None:
            return "kasa_config is for a weight as a whole, and it is one of its calls"
        if rank_of(site, config) >= min(site.shape):
            return f"kasa_config takes r={rank_of(site, config)} singular values away, and it has {min(site.shape)}"
        return None

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, B and the singular values."""
        of_lora = {name: spec._replace(rank=None) for name, spec in super().parameters(site, config).items()}
        return {**of_lora, "lora_diag": ParameterSpec((rank_of(site, config),), key="lora_diag")}

    def replaces(self, site: Site, config: Any) -> bool:
        """Returns that the truncated weight is read."""
        return True

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor]:
        """Draws A, B and the singular values, and truncates the weight."""
        super().initialise(parameters, site, config, module)
        # in the layer's dtype, as in PEFT
        parameters["lora_diag"].copy_(torch.randn(parameters["lora_diag"].shape, dtype=site.dtype))
        U, S, Vh = torch.linalg.svd(weight_of(site, module), full_matrices=False)
        kept = len(S) - len(parameters["lora_diag"])
        return {site.attribute: (U[:, :kept] * S[:kept]) @ Vh[:kept]}

    def rewrite(self, lora_A: Any, lora_diag: Any, **others: Any) -> Any:
        """Adds the branch to the operation's value."""
        return self.lora.rewrite(lora_A=lora_diag.unsqueeze(-1) * lora_A, **others)

    def delta(self, lora_A: Any, lora_B: Any, lora_diag: Any, lora_scaling: Any) -> Any:
        """Returns s B diag(d) A."""
        return self.lora.delta(lora_diag.unsqueeze(-1) * lora_A, lora_B, lora_scaling)


def kasa_loss(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> Tensor:
    """Returns KaSA's penalty, which a training loop adds to its loss; PEFT has it as ``LoraModel._get_kasa_loss``.

    It is β ‖d‖² + γ (‖Bᵀ B − I‖ + ‖A Aᵀ − I‖), summed over all layers with KaSA.

    Args:
        model: An adapted model.
        adapter_names: The adapters that count; None for the active ones.

    Returns:
        The penalty, a scalar in single precision with gradients for A, B and d; zero if there is no KaSA.

    Raises:
        AdaptError: If the model isn't adapted.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"], kasa_config=KasaConfig())
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> bool(kasa_loss(model) > 0)
        True
    """
    state, modules = known_adapters(model), modules_of(model)
    given = state.active if adapter_names is None else adapter_names
    names = [given] if isinstance(given, str) else given
    penalties = []
    for adapter in (state.by_name[name] for name in names if name in state.by_name):
        options: KasaConfig | None = getattr(adapter.config, "kasa_config", None)
        for adapted in adapter.sites if options is not None else ():
            owner = modules[adapted.site.owner]
            tensors = {name: tensor_at(owner, adapted.names[name]).float() for name in adapted.specs}
            penalties.append(_penalty(tensors["lora_A"], tensors["lora_B"], tensors["lora_diag"], options))
    return torch.stack(penalties).sum() if penalties else torch.zeros(())


def _penalty(A: Tensor, B: Tensor, diagonal: Tensor, options: Any) -> Tensor:
    identity = torch.eye(len(diagonal), device=A.device)
    distance = torch.linalg.norm(B.mT @ B - identity) + torch.linalg.norm(A @ A.mT - identity)
    return options.beta * diagonal.square().sum() + options.gamma * distance
