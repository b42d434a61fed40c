"""MonteCLoRA: LoRA whose A is drawn anew in each forward of the training, around a mean that is trained.

    y' = y + s · dropout(x) Ãᵀ Bᵀ        Ã = A + σ Σₙ pₙ Zₙ diag(v)^½ in training, A in evaluation
    v = e²ᵗ ⊙ w, w ~ χ²ᵣ                  p = softmax(log α − mean(log α) + u ⊙ d), α = eᵃ

t (std_prior) and a (expert_weights_prior) are trained, Z and u are standard normal, and d is what a Dirichlet
distribution of α is as wide as. PEFT draws Z, w and u for `buffer_size` forwards ahead; here they are drawn when they
are needed, from the same distributions, so that there is no such buffer, and what runs again for its backward draws the
same. Source: Seth et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
Adaptation", arXiv 2411.04358; the numbers of PEFT's ``tuners/lora/monteclora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributions import Chi2

from graphpeft.graph.recorded import as_node
from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.variants.around import AroundLora
from graphpeft.rules.options import Number, Size, Within, check_options
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.sites.site import Site

_KEY = "lora_monteclora_sampler"
_LEAST_VARIANCE, _LEAST_ALPHA = 1e-3, 1e-6


@dataclass
class MontecloraConfig:
    """The options of MonteCLoRA; the names, defaults and meanings are PEFT's.

    Source: Seth et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
    Adaptation", arXiv 2411.04358.

    Attributes:
        num_samples: The number of samples of which A gets the weighted mean.
        use_entropy: Whether `monteclora_loss` has the sum of the weights' squares in it.
        dirichlet_prior: α of the weights' prior distribution.
        sample_scaler: The factor of the samples.
        kl_loss_weight: The factor of the divergence from the prior distributions in `monteclora_loss`.
        buffer_size: How many samples PEFT draws ahead; here, it decides only how many numbers are drawn when an adapter
            is made, so that those behind them are PEFT's.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"], monteclora_config=MontecloraConfig(num_samples=4))
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)
        >>> model[0].default.lora_monteclora_weights_prior.shape
        torch.Size([4])
    """

    num_samples: Size = 8
    use_entropy: bool = False
    dirichlet_prior: Annotated[float, Within("positive and finite", 1e-30, 3.4e38)] = 0.1
    sample_scaler: Number = 1e-4
    kl_loss_weight: Number = 1e-5
    buffer_size: Size = 150

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Monteclora(AroundLora):
    """The branch of a linear layer, whose A is drawn in training.

    Attributes:
        samples: The number of samples.
        scaler: Their factor.
    """

    samples: int
    scaler: float

    def parameters(self, site: Site, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, B, t and a, what the last forward made of these, and the numbers that it drew for that."""
        of_lora = {name: spec._replace(rank=None) for name, spec in super().parameters(site, config).items()}
        rank, size = rank_of(site, config), self.samples
        return {
            **of_lora,
            "lora_monteclora_std_prior": ParameterSpec((rank,), f"{_KEY}.std_prior"),
            "lora_monteclora_weights_prior": ParameterSpec((size,), f"{_KEY}.expert_weights_prior"),
            "lora_monteclora_variances": ParameterSpec((rank, rank), f"{_KEY}.gaussian_var_prior", is_trained=False),
            "lora_monteclora_weights": ParameterSpec((size,), f"{_KEY}.expert_weights", is_trained=False),
            "lora_monteclora_drawn": ParameterSpec((rank + size,), f"{_KEY}.drawn", is_trained=False, is_saved=False),
        }

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Gives A and B the values that LoRA gives them, and draws t and a."""
        replacing = super().initialise(parameters, site, config, module)
        # in the layer's dtype, as in PEFT
        for name in ("std", "weights"):
            prior = parameters[f"lora_monteclora_{name}_prior"]
            prior.copy_(torch.rand(prior.shape, dtype=site.dtype))
        parameters["lora_monteclora_variances"].copy_(torch.eye(rank_of(site, config)))
        parameters["lora_monteclora_weights"].fill_(1 / self.samples)
        _draw_ahead(config.monteclora_config.buffer_size, self.samples, parameters["lora_A"].shape, site.dtype)
        self.complete(parameters, site, config, module)
        return replacing

    def complete(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets the numbers that a forward draws to zero: none has drawn any."""
        parameters["lora_monteclora_drawn"].zero_()

    def rewrite(
        self,
        lora_A: Any,
        training: Any,
        lora_monteclora_std_prior: Any,
        lora_monteclora_weights_prior: Any,
        lora_monteclora_variances: Any,
        lora_monteclora_weights: Any,
        lora_monteclora_drawn: Any,
        **others: Any,
    ) -> Any:
        """Adds the branch to the operation's value."""
        priors = lora_monteclora_std_prior, lora_monteclora_weights_prior
        state = lora_monteclora_variances, lora_monteclora_weights, lora_monteclora_drawn
        drawn = as_node(_drawn_around, lora_A, *priors, *state, self.scaler, training)
        return self.lora.rewrite(lora_A=drawn, training=training, **others)

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, or its transpose."""
        return self.lora.delta(lora_A, lora_B, lora_scaling)


def _draw_ahead(ahead: int, samples: int, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Draws the numbers that PEFT draws for the first forwards, so that those behind them are PEFT's."""
    rank, features = shape
    torch.randn(ahead, samples, features, rank, dtype=dtype)
    torch.randn(ahead, samples, dtype=dtype)
    # PyTorch draws none in half precision
    precise = torch.promote_types(torch.get_default_dtype(), torch.float32)
    lengths = Chi2(rank - torch.arange(rank, dtype=precise))
    for _ in range(ahead):
        lengths.sample()
        torch.randn(rank * (rank - 1) // 2)


def _drawn_around(
    A: Tensor,
    std_prior: Tensor,
    weights_prior: Tensor,
    variances: Tensor,
    weights: Tensor,
    drawn: Tensor,
    scaler: float,
    training: bool,
) -> Tensor:
    """Returns A, in training with the mean of samples added to it, and notes from what these were drawn."""
    if not training:
        return A
    samples, rank = len(weights_prior), len(std_prior)
    normal = std_prior.new_empty(samples, A.shape[1], rank).normal_()
    # the diagonal of a Wishart distribution's matrix
    squares = std_prior.new_empty(rank, rank).normal_().square().sum(1)
    shifts = weights_prior.new_empty(samples).normal_()
    with torch.no_grad():
        drawn.copy_(torch.cat([squares, shifts]))
    own_variances, own_weights = variances_of(std_prior, squares), weights_of(weights_prior, shifts)
    with torch.no_grad():
        variances.copy_(own_variances.diag())
        weights.copy_(own_weights)
    noise = torch.einsum("n,nir->ri", own_weights, normal) * own_variances.sqrt().unsqueeze(-1)
    return A + (scaler * noise).to(A.dtype)


def variances_of(std_prior: Tensor, squares: Tensor) -> Tensor:
    """Returns the variances v of a forward, (r,).

    Args:
        std_prior: The logarithms of the standard deviations, (r,).
        squares: The diagonal of a Wishart distribution's matrix, (r,).
    """
    return (std_prior.exp().square() * squares).clamp(min=_LEAST_VARIANCE)


def weights_of(weights_prior: Tensor, shifts: Tensor) -> Tensor:
    """Returns the weights p of a forward's samples, (samples,).

    Args:
        weights_prior: The logarithms of their priors, (samples,).
        shifts: The draw for each, (samples,).
    """
    of = len(weights_prior)
    alpha = weights_prior.exp().clamp(min=_LEAST_ALPHA)
    inverse, log = 1 / alpha, alpha.log()
    spread = (inverse * (1 - 2 / of) + inverse.sum() / of**2).clamp(min=_LEAST_ALPHA) + _LEAST_ALPHA
    return torch.softmax(log - log.mean() + spread.sqrt() * shifts, dim=-1)
