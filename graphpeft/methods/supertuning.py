"""Super-Tuning: the largest elements of a weight are trained, or its smallest; beside them LoRA, if `r` is set (Supra).

    ΔW[places] = v                 places: those of the weight's largest, or smallest, elements
    ΔW[places] = v, + (α/r) B A    with `r`

Source: "Super-Tuning", arXiv 2607.09287; the same numbers as PEFT's ``tuners/supertuning/layer.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.default_targets import DEFAULT_TARGET_MODULES
from graphpeft.methods.lycoris import draw
from graphpeft.methods.matrices import matrices_of
from graphpeft.methods.placed import Placed
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.options import Editable, InitWeights, Number, Size, Within
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.registry import register
from graphpeft.targeting import targets
from graphpeft.targeting.target_config import TargetedConfig

_Share = Annotated[float, Within("a number from 0 on, and below 1", 0, math.nextafter(1, 0))]


@dataclass(frozen=True, kw_only=True)
class Supertuning(Placed):
    """The change of the chosen elements of one weight, and a product of low rank.

    Attributes:
        has_product: Whether a product of low rank is added.
    """

    has_product: bool = False

    needs_matrix: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses a sparsity that leaves no element."""
        reason = super().check(site, config)
        size = math.prod(site.shape)
        if reason is None and not _count(size, config):
            reason = f"sparsity={config.sparsity} leaves none of the {size} elements of its {site.attribute}; lower it"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the elements and their places, and the factors of the product."""
        count = _count(math.prod(site.shape), config)
        places = ParameterSpec(
            (count,),
            key="supertuning_indices",
            is_trained=False,
            is_saved=config.save_precomputed_indices,
            dtype=torch.int32,
        )
        specs = {"supertuning_values": ParameterSpec((count,), "supertuning_values"), "supertuning_indices": places}
        if self.has_product:
            stack, rows, columns = matrices_of(site)
            shapes = {"A": (*stack, config.r, columns), "B": (*stack, rows, config.r)}
            specs |= {
                f"supertuning_lora_{name}": ParameterSpec(shape, f"supertuning_lora_{name}.weight")
                for name, shape in shapes.items()
            }
        return specs

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Chooses the places by the weight, and sets the elements and B to zero, or draws them."""
        self._choose_places(parameters["supertuning_indices"], site, config, module)
        values = parameters["supertuning_values"]
        values.zero_() if config.init_weights else values.normal_()
        if self.has_product:
            A, B = (parameters[f"supertuning_lora_{name}"] for name in "AB")
            # PEFT makes two linear layers, which draws, before it draws A
            for factor in (A, B, A):
                draw(factor, site)
            B.zero_() if config.init_weights else draw(B, site)

    def complete(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Chooses the places that a file lacks, by the weight; refuses those of a file that can't be."""
        if config.save_precomputed_indices:
            super().complete(parameters, site, config, module)
        else:
            self._choose_places(parameters["supertuning_indices"], site, config, module)

    def _choose_places(self, places: Tensor, site: Any, config: Any, module: nn.Module) -> None:
        weight = read_weight(module, site.attribute)
        assert weight is not None
        sizes = self.layout.turned(weight.detach()).abs().flatten()
        places.copy_(torch.topk(sizes, len(places), largest=config.select_top).indices)

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns α/r."""
        return {"scale": config.lora_alpha / config.r} if self.has_product else {}

    def dropout_of(self, config: Any) -> float:
        """Returns `lora_dropout`, which acts on the product's input."""
        return config.lora_dropout if self.has_product else 0.0

    def elements(self, own: Mapping[str, Any]) -> tuple[Any, Any]:
        """Returns the elements, and their places."""
        return own["supertuning_values"], own["supertuning_indices"]

    def keeps_apart(self, apart: Any) -> Any:  # type: ignore[override]  # a rule is given the arguments that it names
        """Returns whether the run is to keep the weight and its elements apart; dropout is a matter of the product."""
        return apart

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        change: Any,
        bias_change: Any = None,
        dropout: Any = None,
        *,
        apart: Any = None,
        **own: Any,
    ) -> Any:
        """Returns y + operation(x, the elements) + operation(dropout(x), the product)."""
        if not self.has_product:
            return super().rewrite(x, y, operation, training, change, bias_change, dropout, apart=apart, **own)
        A, B, scale = own["supertuning_lora_A"], own["supertuning_lora_B"], own["scale"]
        h = self.entering(x, A, training, None)
        if apart is None:
            result = y + operation.apply(h, self.layout.turned(super().delta(**own)))
        else:
            result = self.with_branch(x, y, operation, apart, own)
        h = h if dropout is None else F.dropout(h, dropout, training)
        if self.multiplies(operation):
            branch = F.linear(F.linear(h, A), B) * scale
        else:
            branch = operation.apply(h, self.layout.turned(self._product(A, B, scale)))
        return self.leaving(result + branch, y)

    def delta(self, **own: Any) -> Any:
        """Returns ΔW."""
        elements = super().delta(**own)
        if not self.has_product:
            return elements
        return elements + self._product(own["supertuning_lora_A"], own["supertuning_lora_B"], own["scale"])

    def _product(self, A: Any, B: Any, scale: Any) -> Any:
        return self.shaped(B @ A * scale)


def _count(size: int, config: Any) -> int:
    """Returns how many elements of a weight are trained, as PEFT rounds it."""
    return int(size * (1 - config.sparsity))


@register
@dataclass(kw_only=True)
class SupertuningConfig(TargetedConfig):
    """The options of Super-Tuning beside the ones that name targets; the names, defaults and meanings are PEFT's.

    Source: "Super-Tuning", arXiv 2607.09287.

    Attributes:
        sparsity: The share of a weight's elements that aren't trained, below 1.
        select_top: Whether the elements of the largest magnitude are trained; if False, those of the smallest.
        r: The rank of a product that is added, as in LoRA; None for none.
        lora_alpha: α of the product; None for 2 r.
        lora_dropout: The probability of dropping an element of the product's input, in training.
        init_weights: Whether the elements and B are zero at first; if False, they are drawn.
        save_precomputed_indices: Whether files have the places. Without them, these are chosen anew where a file is
            loaded, which are the same places only if the base has the very same weights.

    Raises:
        ValueError: For a value that an option can't have, and for `lora_alpha` without `r`.

    Examples:
        >>> config = SupertuningConfig(sparsity=0.9, target_modules=["0"])
        >>> get_peft_model(nn.Sequential(nn.Linear(8, 16)), config)[0].default.supertuning_values.shape
        torch.Size([12])
    """

    peft_type: ClassVar[PeftType] = PeftType.SUPERTUNING
    prefix: ClassVar[str | None] = "supertuning_"
    lacks: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
    default_targets: ClassVar[targets.Defaults] = DEFAULT_TARGET_MODULES

    sparsity: _Share = 0.99
    select_top: bool = True
    r: Size | None = None
    lora_alpha: Number | None = None
    lora_dropout: Editable[_Share] = 0.0
    init_weights: InitWeights = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("lora_alpha is the scale of a product of rank r, and r is None; set r, or leave it out")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not self.save_precomputed_indices:
            warnings.warn(
                "save_precomputed_indices=False: where a file is loaded, the places are chosen anew by the base's "
                "weights, which must be the very same; another dtype or rounding may choose others",
                PeftWarning,
                stacklevel=3,
            )

    def rule_for(self, site: Any, dtype: torch.dtype) -> Supertuning:
        """Returns the rule for a weight's shape."""
        shape, columns = site.matrix_shape, matrices_of(site).columns
        return Supertuning(shape=shape, columns=columns, has_product=self.r is not None)
