"""DeLoRA: a product of low rank whose factors only give directions, and a trained number λ that bounds its size.

    ΔW = B diag(λ / (r ‖aᵢ‖ ‖bᵢ‖)) A diag(w)        aᵢ: the rows of A, bᵢ: the columns of B; lengths of 0.0001 at least
                                                    w: the lengths of the columns of W at first, which are kept

Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225; the same numbers as
PEFT's ``tuners/delora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.lycoris import draw
from graphpeft.methods.matrices import as_matrices, matrices_of
from graphpeft.rules.delta_rule import ProductRule
from graphpeft.rules.options import Editable, InitWeights, InputDropout, Number, Size, TrainedBiases
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.products import Diagonal, Product
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig


@dataclass(frozen=True, kw_only=True)
class Delora(ProductRule):
    """The change at one weight."""

    needs_matrix: ClassVar[bool] = True

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A, B, λ and w."""
        rank, (stack, rows, columns) = config.value_at("r", site), matrices_of(site)
        shapes = {"delora_A": (*stack, rank, columns), "delora_B": (*stack, rows, rank), "delora_lambda": (*stack, 1)}
        specs = {name: ParameterSpec(shape, key=name) for name, shape in shapes.items()}
        return {**specs, "delora_w_norm": ParameterSpec((*stack, columns), key="delora_w_norm", is_trained=False)}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A, and B unless it is zero, and measures W."""
        draw(parameters["delora_A"], site)
        if config.init_weights:
            parameters["delora_B"].zero_()
        else:
            draw(parameters["delora_B"], site)
        parameters["delora_lambda"].fill_(config.value_at("delora_lambda", site))
        weight = read_weight(module, site.attribute)
        assert weight is not None
        parameters["delora_w_norm"].copy_(as_matrices(self.layout.turned(weight.detach()), site).norm(dim=-2))

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the rank."""
        return {"rank": config.value_at("r", site)}

    def product(self, delora_A: Any, delora_B: Any, delora_lambda: Any, delora_w_norm: Any, rank: Any) -> Product:
        """Returns B diag(…) A diag(w)."""
        between = scales(delora_A, delora_B, delora_lambda, rank)
        return Product((delora_B, Diagonal(between), delora_A, Diagonal(delora_w_norm)))


def scales(A: Any, B: Any, strength: Any, rank: Any) -> Any:
    """Returns λ / (r ‖aᵢ‖ ‖bᵢ‖) for each i.

    Args:
        A: Of shape (…, r, in).
        B: Of shape (…, out, r).
        strength: λ, of shape (…, 1).
        rank: r.
    """
    lengths = A.norm(dim=-1).clamp(min=1e-4) * B.norm(dim=-2).clamp(min=1e-4)
    return strength / rank / lengths


@register
@dataclass(kw_only=True)
class DeloraConfig(TargetedConfig):
    """The options of DeLoRA beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225.

    Attributes:
        r: The rank.
        delora_lambda: λ at first, the bound of the change's size.
        module_dropout: The probability of dropping an element of the branch's input, in training.
        bias: The biases that are trained: ``"none"``, ``"all"``, or ``"delora_only"``, the adapted layers'.
        init_weights: Whether B is zero at first; if False, it is drawn like A.
        rank_pattern: Other ranks, by regular expressions for the end of a path; the first that matches counts.
        lambda_pattern: Other λ, by the same kind of patterns.

    Raises:
        ValueError: For a value that an option can't have, and for options that contradict each other.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 16)), DeloraConfig(r=2, target_modules=["0"]))
        >>> model[0].default.delora_A.shape, model[0].default.delora_lambda.item()
        (torch.Size([2, 8]), 15.0)
    """

    peft_type: ClassVar[PeftType] = PeftType.DELORA
    prefix: ClassVar[str | None] = "delora_"
    patterns: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    r: Size = 8
    delora_lambda: Editable[Number] = 15
    module_dropout: InputDropout = 0.0
    bias: TrainedBiases[Literal["none", "all", "delora_only"]] = "none"
    init_weights: InitWeights = True
    rank_pattern: dict[str, Size] = field(default_factory=dict)
    lambda_pattern: Editable[dict[str, Number]] = field(default_factory=dict)

    def rule_for(self, site: Any, dtype: torch.dtype) -> Delora:
        """Returns the rule for a weight's kernel, or for a matrix."""
        return Delora()
