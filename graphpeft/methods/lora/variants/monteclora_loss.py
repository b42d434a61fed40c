"""How far the distributions of MonteCLoRA's samples are from their priors, which its training adds to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.adapters.adapting import known_adapters, modules_of
from graphpeft.graph.holders import tensor_at
from graphpeft.methods.lora.variants.monteclora import MontecloraConfig, variances_of, weights_of


def monteclora_loss(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> Tensor:
    """Returns MonteCLoRA's loss, which a training loop adds to its own (PEFT's ``LoraModel._get_monteclora_loss``).

    It is how far the distributions of the last forward's samples are from their priors, with the sum of the weights'
    squares if `use_entropy` says so: the mean over all layers with MonteCLoRA, of which those in evaluation have 0.

    Args:
        model: An adapted model.
        adapter_names: The adapters that count; None for the active ones.

    Returns:
        The loss, a scalar in single precision with gradients for the trained priors; zero if there is no MonteCLoRA.

    Raises:
        AdaptError: If the model isn't adapted.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"], monteclora_config=MontecloraConfig())
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config).train()
        >>> loss = model(torch.ones(1, 8)).sum() + monteclora_loss(model)
        >>> loss.backward()
    """
    state, modules = known_adapters(model), modules_of(model)
    given = state.active if adapter_names is None else adapter_names
    names = [given] if isinstance(given, str) else given
    losses = []
    for adapter in (state.by_name[name] for name in names if name in state.by_name):
        options: MontecloraConfig | None = getattr(adapter.config, "monteclora_config", None)
        for adapted in adapter.sites if options is not None else ():
            owner = modules[adapted.site.owner]
            tensors = {name: tensor_at(owner, adapted.names[name]).float() for name in adapted.specs}
            losses.append(_loss(tensors, options) if owner.training else torch.zeros(()))
    return torch.stack(losses).mean() if losses else torch.zeros(())


def _loss(tensors: Mapping[str, Tensor], options: Any) -> Tensor:
    """Returns a layer's loss, with gradients through what its last forward has drawn, if there was one."""
    std_prior, weights_prior = tensors["lora_monteclora_std_prior"], tensors["lora_monteclora_weights_prior"]
    # the next forward draws in place, maybe before this one's backward
    drawn, rank = tensors["lora_monteclora_drawn"].clone(), len(std_prior)
    squares, shifts = drawn[:rank], drawn[rank:]
    variances = torch.where(drawn.any(), variances_of(std_prior, squares), tensors["lora_monteclora_variances"].diag())
    weights = torch.where(drawn.any(), weights_of(weights_prior, shifts), tensors["lora_monteclora_weights"])
    divergence = (
        _dirichlet_divergence(weights_prior.exp(), options.dirichlet_prior)
        + 0.5 * rank * ((2 * std_prior).exp() - 2 * std_prior - 1).sum()
        + 0.5 * len(weights_prior) * (variances - variances.log() - 1).sum()
    )
    return options.kl_loss_weight * divergence + (weights.square().sum() if options.use_entropy else 0)


def _dirichlet_divergence(alpha: Tensor, prior: float) -> Tensor:
    """Returns the divergence from equal weights' distribution, with PEFT's sign of its second term."""
    priors = torch.full_like(alpha, prior)
    return (
        alpha.sum().lgamma()
        - priors.sum().lgamma()
        + (alpha.lgamma() - priors.lgamma()).sum()
        + ((alpha - priors) * (alpha.digamma() - alpha.sum().digamma())).sum()
    )
