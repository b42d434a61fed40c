"""Arrow: a router that mixes LoRA adapters, token by token, by how well each of them knows the direction of a token.

    y' = y + Σₑ cₑ · sₑ x Aₑᵀ Bₑᵀ        cₑ = softmax over the top k of |x · pₑ| / temperature

pₑ, an expert's prototype, is the first right singular vector of Bₑ Aₑ, by power iterations. With general adapters
(GenKnowSub), the mean of their A and of their B is taken from those of each expert first. Source: Ostapenko et al.,
"Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157; Bagherifard et al., ACL 2025 short
papers 54; the same numbers as PEFT's ``tuners/lora/arrow.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.methods.lora.factors import rank_of
from graphpeft.methods.lora.linear import LoraLeaf, LoraLinear
from graphpeft.rules.options import Seed, Size, Within, check_options
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import OperationRule

_STEPS = 15
_TINY = 1e-8


@dataclass
class ArrowConfig:
    """The options of Arrow, for `create_arrow_model`; the names, defaults and meanings are PEFT's.

    Source: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157.

    Attributes:
        top_k: The number of experts for a token.
        router_temperature: By what similarities are divided.
        use_gks: Whether the mean of general adapters is taken from each expert (GenKnowSub).
        task_adapter_names: The experts; `create_arrow_model` sets it.
        gks_adapter_names: The general adapters; `create_arrow_model` sets it.
        rng_seed: The seed of the vectors with which the iterations for each prototype begin; None for PyTorch's own
            generator.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> ArrowConfig(top_k=2).router_temperature
        1.0
    """

    top_k: Size = 3
    router_temperature: Annotated[float, Within("positive and finite", 1e-30, 3.4e38)] = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: Seed | None = None

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Arrow(OperationRule):
    """The mixture beside a linear layer, or beside the call of a quantised one.

    Attributes:
        lora: LoRA's rule for the same site.
        top_k: The number of experts for a token.
        temperature: By what similarities are divided.
    """

    lora: LoraLinear | LoraLeaf
    top_k: int
    temperature: float

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses the same as LoRA, and options of which a router has no use."""
        odd = next((name for name in ("lora_dropout", "lora_bias", "rank_pattern") if getattr(config, name)), None)
        if odd is not None:
            return f"{odd} is for experts, and arrow_config makes a router of them; leave it out"
        return self.lora.check(site, config)

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B of all experts, the latter with their scales, and the prototypes; none is trained."""
        of, rank = len(config.arrow_config.task_adapter_names), rank_of(site, config)
        shapes = {
            "lora_arrow_A": (of, rank, site.in_features),
            "lora_arrow_B": (of, site.out_features, rank),
            "lora_arrow_prototypes": (of, site.in_features),
        }
        return {name: ParameterSpec(shape, name, is_trained=False) for name, shape in shapes.items()}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Sets all to zero, before they get the experts' values."""
        for tensor in parameters.values():
            tensor.zero_()

    def rewrite(self, x: Any, y: Any, lora_arrow_A: Any, lora_arrow_B: Any, lora_arrow_prototypes: Any) -> Any:
        """Adds the mixture to the operation's value."""
        h = x.to(lora_arrow_A.dtype) if self.lora.casts else x
        given = lora_arrow_A, lora_arrow_B, lora_arrow_prototypes, self.top_k, self.temperature
        result = y + as_node(mixture, h, *given)
        return result.to(y.dtype) if self.lora.casts else result

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "Arrow chooses experts for each token, so that no one weight does what it does"


def mixture(h: Tensor, A: Tensor, B: Tensor, prototypes: Tensor, top_k: int, temperature: float) -> Tensor:
    """Returns the mixture of the experts' branches.

    Args:
        h: The tokens, (…, in).
        A: Of shape (experts, r, in).
        B: With the scales, (experts, out, r).
        prototypes: Of shape (experts, in).
        top_k: The number of experts for a token.
        temperature: By what similarities are divided.
    """
    similarity = (h @ prototypes.mT).abs()
    best, chosen = similarity.topk(top_k, dim=-1)
    shares = torch.zeros_like(similarity).scatter(-1, chosen, torch.softmax(best / temperature, dim=-1))
    down = torch.einsum("...i,eri->...er", h, A) * shares.unsqueeze(-1)
    return torch.einsum("...er,eor->...o", down, B)


class Expert(NamedTuple):
    """An expert's factors at a layer.

    Attributes:
        A: Of shape (r, in).
        B: Of shape (out, r).
        scale: s.
    """

    A: Tensor
    B: Tensor
    scale: float


@torch.no_grad()
def tensors_of(experts: Sequence[Expert], general: Sequence[Expert], seed: int | None) -> dict[str, Tensor]:
    """Returns the values of a router's parameters at a layer."""
    A, B = (torch.stack(factors) for factors in ([e.A for e in experts], [e.B for e in experts]))
    if general:
        A = A - torch.stack([each.A for each in general]).mean(0)
        B = B - torch.stack([each.B for each in general]).mean(0)
    prototypes = torch.stack([_prototype(a, b, seed) for a, b in zip(A, B, strict=True)])
    scales = torch.tensor([expert.scale for expert in experts], dtype=B.dtype, device=B.device)
    return {
        "lora_arrow_A": A,
        "lora_arrow_B": B * scales.view(-1, 1, 1),
        "lora_arrow_prototypes": prototypes.to(A.dtype),
    }


def _prototype(A: Tensor, B: Tensor, seed: int | None) -> Tensor:
    """Returns the first right singular vector of B A, as PEFT computes it."""
    A, B = A.float(), B.float()
    generator = None if seed is None else torch.Generator(A.device.type).manual_seed(seed)
    gram = B.mT @ B
    vector = torch.randn(A.shape[1], device=A.device, generator=generator)
    vector = vector / (vector.norm() + _TINY)
    for _ in range(_STEPS):
        vector = A.mT @ (gram @ (A @ vector))
        vector = vector / (vector.norm() + _TINY)
    return vector
