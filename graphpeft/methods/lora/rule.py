"""The base classes of LoRA's rules.

W' = W + s · B A                     of each: a product of two factors, with the scale s
y' = y + s · branch(dropout(x))      of those at an operation, which don't compute W'
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.low_rank_sum import plus_product, plus_stacked_product
from graphpeft.graph.recorded import as_node
from graphpeft.graph.scaled_sum import add_scaled
from graphpeft.methods.lora.factors import draw, rank_of, scaling_of
from graphpeft.methods.lora.init.initialisation import RANDOM
from graphpeft.rules.parameter_spec import Dropout, ParameterSpec
from graphpeft.rules.products import Product
from graphpeft.rules.rule import Mergeable, OperationRule
from graphpeft.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoraRule(Mergeable):
    """A product of two factors, `lora_A`, which is applied first, and `lora_B`, with random first values.

    Attributes:
        drops: Whether elements of the branch's input are dropped in training.
        flipped: Whether the product is the change of the weight's transpose, as in PEFT at a layer that stores its
            weight as (in, out), so that A is (r, in) and B (out, r) in every layer; at an embedding's table, and at a
            head that is tied to it. At a plain parameter it doesn't depend on how that is used.
    """

    drops: bool = False
    flipped: bool = False

    adapts_both_ways: ClassVar[bool] = True
    scales: ClassVar[tuple[str, ...]] = ("lora_scaling",)

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses dropout without an input, and a bias of B where PEFT has none."""
        return dropout_refusal(site, config) or bias_refusal(site, config)

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the scale, and the probability of dropout if there is one."""
        scale = {"lora_scaling": scaling_of(site, config)}
        return scale | {"lora_dropout": Dropout(config.lora_dropout)} if self.drops else scale

    def initialise(
        self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module
    ) -> Mapping[str, Tensor] | None:
        """Draws A and B as PEFT does."""
        draw(parameters, config.init_lora_weights, rank_of(site, config))

    def factored(self, lora_A: Any, lora_B: Any) -> Product:
        """Returns B A, or its like."""
        return Product((lora_B, lora_A))

    def stored(self, product: Any) -> Any:
        """Returns the product's result as the weight is stored."""
        return product.mT if self.flipped else product

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, as the weight is stored."""
        return self.stored(self.factored(lora_A, lora_B).dense() * lora_scaling)


class Combines(ABC):
    """A rule whose change is the matrix B A, so that several changes can be combined into one."""

    @abstractmethod
    def as_product(self, delta: Any) -> Any:
        """Returns a change of the stored weight in the shape of B A: a matrix, or a stack of these."""


@dataclass(frozen=True, kw_only=True)
class LoraOfMatrices(LoraRule, Combines):
    """The change of a matrix, or of each matrix in a stack."""

    def changed_weight(
        self, weight: Any, given: Mapping[str, Any], training: Any = False, lora_dropout: Any = 0.0
    ) -> Any:
        """Returns the weight; a stack, or one whose input has dropout, beside the factors of its change."""
        first, second = self.factored(given["lora_A"], given["lora_B"]).halves()
        if self.flipped:
            first, second = second.mT, first.mT
        if self.drops:
            return plus_product(weight, first, second, given["lora_scaling"], lora_dropout, training)
        return as_node(plus_stacked_product, weight, first, second, given["lora_scaling"])

    def as_product(self, delta: Any) -> Any:
        """Returns a change of the weight as the matrix B A, or as a stack of such."""
        return self.stored(delta)


@dataclass(frozen=True, kw_only=True)
class LoraBranch(LoraRule, OperationRule):
    """A branch beside an operation, whose values are added to the operation's.

    Attributes:
        casts: Whether the dtype of A and B differs from the weight's.
    """

    casts: bool

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        lora_bias: Any = None,
        lora_scaling: Any,
        lora_dropout: Any = None,
        training: Any,
    ) -> Any:
        """Adds the branch to the operation's value."""
        h = self.input_of(x, lora_A, lora_dropout, training)
        result = add_scaled(y, self.branch(h, operation, lora_A, lora_B, lora_bias), lora_scaling)
        return result.to(y.dtype) if self.casts else result

    def input_of(self, x: Any, lora_A: Any, lora_dropout: Any, training: Any) -> Any:
        """Returns the branch's input: the operation's in the dtype of A, after dropout if there is one."""
        h = x.to(lora_A.dtype) if self.casts else x
        return F.dropout(h, lora_dropout, training) if self.drops else h

    def branch(self, h: Any, operation: Any, lora_A: Any, lora_B: Any, lora_bias: Any = None) -> Any:
        """Returns the branch's value without the scale: h (B A)ᵀ + c, or h B A + c."""
        product = self.factored(lora_A, lora_B)
        made = product.turned(h) if operation.transposed != self.flipped else product.unscaled(h)
        return made if lora_bias is None else made + lora_bias


@dataclass(frozen=True, kw_only=True)
class LoraBranchWithBias(LoraBranch):
    """A branch whose B can have a bias, by the option `lora_bias`.

    Attributes:
        has_bias: Whether it has.
    """

    has_bias: bool = False

    def bias_parameter(self, features: int) -> Mapping[str, ParameterSpec]:
        """Returns the bias of B, (features,), if it has one."""
        return {"lora_bias": ParameterSpec((features,), key="lora_B.bias")} if self.has_bias else {}

    def unmergeable(self, site: Site) -> str | None:
        """Refuses a bias of B where the operation adds none."""
        if not self.has_bias or site.bias is not None:
            return None
        return "it has no bias of its own, into which that of lora_bias could go"

    @property
    def changes_bias(self) -> bool:
        """Whether B has a bias."""
        return self.has_bias

    def bias_delta(self, lora_scaling: Any, lora_bias: Any = None) -> Any:
        """Returns s times the bias of B, if it has one."""
        return lora_bias * lora_scaling if lora_bias is not None else None


def dropout_refusal(site: Any, config: Any) -> str | None:
    """Returns the reason why there can be no dropout, if there should be: a weight as such has no input.

    An adapter for inference has none anyway.
    """
    if site.op is not ops.Weight or not config.lora_dropout or config.inference_mode:
        return None
    use = f"the use of its {site.attribute} has none that is known"
    return f"lora_dropout={config.lora_dropout} drops elements of an operation's input, and {use}; set lora_dropout=0"


def bias_refusal(site: Site, config: Any) -> str | None:
    """Returns the reason why B can have no bias, if it should have one: in PEFT's files, that is a layer's."""
    if not config.lora_bias or (site.is_layer and site.layout is site.op and site.layout is not ops.Embedding):
        return None
    return "lora_bias=True is for the outputs of linear layers and convolutions, which this is none of"


def variant_refusal(config: Any, what: str, variants: Sequence[str] = ("use_dora", "lora_bias")) -> str | None:
    """Returns the reason why a variant of LoRA that the config asks for can't be."""
    for name in variants:
        if getattr(config, name):
            return f"{name}={getattr(config, name)!r} is for layers, and it is {what}"
    if config.init_lora_weights not in RANDOM:
        return f"init_lora_weights={config.init_lora_weights!r} is for layers, and it is {what}"
    return None
