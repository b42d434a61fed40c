"""X-LoRA at a layer: the branches of all experts, each weighed for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import as_node
from graphpeft.methods.lora.embedding import LoraEmbedding
from graphpeft.methods.lora.linear import LoraLeaf, LoraLinear
from graphpeft.methods.xlora.classifier import draw, layers_of
from graphpeft.methods.xlora.scalings import INPUT, shares_at
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import OperationRule
from graphpeft.sites.site import LeafSite


@dataclass(frozen=True)
class XLora(OperationRule):
    """The branches beside a linear layer, an embedding, or the call of a quantised layer.

    Attributes:
        lora: LoRA's rule for the same site.
        ranks: The rank of each expert; 0 for one that doesn't adapt the layer.
        scale_of_each: The scale of each expert's product.
        dropouts: The probability of dropping an element of each expert's input.
        dtype: The dtype of A and B.
        is_flat: Whether the layer has rows and positions in one dimension.
    """

    lora: LoraLinear | LoraLeaf | LoraEmbedding
    ranks: tuple[int, ...]
    scale_of_each: tuple[float, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype
    is_flat: bool

    call_inputs: ClassVar[tuple[str, ...]] = (INPUT,)
    call_inputs_by_row: ClassVar[bool] = True

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses what is no layer of PEFT's that X-LoRA weighs."""
        if type(self.lora) not in (LoraLinear, LoraLeaf, LoraEmbedding):
            return (
                "X-LoRA weighs products of A and B at linear layers and embeddings, and there LoRA's rule is "
                f"{type(self.lora).__name__}"
            )
        if not isinstance(site, LeafSite) and (not site.is_layer or site.named is not None or site.tied_to is not None):
            return (
                "X-LoRA weighs experts at layers, and it is a weight of its own, or one of several of a module, or tied"
            )
        return None

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B of all experts, side by side, and at the first layer the classifier."""
        A, B = (each.shape for each in config.experts.side_by_side(site.label))
        is_trained, number = config.use_trainable_adapters, sum(self.ranks)
        own = ParameterSpec((), "", is_trained=is_trained, is_saved=is_trained, dtype=self.dtype, is_counted=True)
        fixed = ParameterSpec((number,), "", is_trained=False, is_saved=False)
        return {
            "xlora_A": own._replace(shape=tuple(A), key="xlora_A"),
            "xlora_B": own._replace(shape=tuple(B), key="xlora_B"),
            "xlora_experts": fixed._replace(key="xlora_experts", dtype=torch.int64),
            **({} if config.layers[site.label] else config.classifier),
        }

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the layer's number, and the key of the adapter's scalings."""
        return {"xlora_layer": config.layers[site.label], "xlora_key": config.key}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Gives A and B the experts' values, and draws the classifier at the first layer."""
        self._fill(parameters, site, config, ("xlora_A", "xlora_B", "xlora_experts"))
        if config.layers[site.label]:
            return
        for expert in config.experts.every:
            expert.draw(module)
        draw(layers_of(config, parameters))

    def complete(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Gives A and B the experts' values, unless they are trained, and so in the file."""
        factors = () if config.use_trainable_adapters else ("xlora_A", "xlora_B")
        self._fill(parameters, site, config, (*factors, "xlora_experts"))

    def _fill(self, parameters: Mapping[str, Tensor], site: Any, config: Any, names: tuple[str, ...]) -> None:
        # through the weight's dtype, in which PEFT has them for a moment
        A, B = (each.to(site.dtype) for each in config.experts.side_by_side(site.label))
        values = {"xlora_A": A, "xlora_B": B, "xlora_experts": config.experts.numbers(site.label)}
        for name in names:
            parameters[name].copy_(values[name])

    def rewrite(
        self,
        x: Any,
        y: Any,
        operation: Any,
        training: Any,
        xlora_scalings: Any,
        xlora_A: Any,
        xlora_B: Any,
        xlora_experts: Any,
        xlora_layer: Any,
        xlora_key: Any,
    ) -> Any:
        """Adds the weighed branches to the operation's value."""
        if isinstance(self.lora, LoraEmbedding):
            # A is no leaf here, and only leaves can have sparse gradients
            down = operation.apply(x, xlora_A.T, sparse=False)
        else:
            h = x.to(xlora_A.dtype) if self.lora.casts else x
            drops = any(self.dropouts)
            down = (
                as_node(down_by_expert, h, xlora_A, self.ranks, self.dropouts, training)
                if drops
                else F.linear(h, xlora_A)
            )
        result = as_node(
            weighed,
            y,
            down,
            xlora_B,
            xlora_experts,
            self.scale_of_each,
            xlora_scalings,
            xlora_key,
            xlora_layer,
            self.is_flat,
        )
        return result.to(y.dtype) if self.lora.casts else result

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "X-LoRA weighs its experts for each token, so that no one weight does what it does"


def down_by_expert(h: Tensor, A: Tensor, ranks: tuple[int, ...], dropouts: tuple[float, ...], training: bool) -> Tensor:
    """Returns h Aᵀ, (…, ranks), where each expert's part has an input with other elements dropped.

    Args:
        h: The input, (…, in).
        A: Of all experts, (ranks, in).
        ranks: The rank of each expert.
        dropouts: The probability of dropping an element, of each expert.
        training: Whether elements are dropped.
    """
    parts = [
        F.linear(F.dropout(h, probability, training) if probability else h, part)
        for part, probability in zip(A.split(ranks), dropouts, strict=True)
        if len(part)
    ]
    return torch.cat(parts, dim=-1)


def weighed(
    y: Tensor,
    down: Tensor,
    B: Tensor,
    experts: Tensor,
    scales: tuple[float, ...],
    scalings: Any,
    key: int,
    layer: int,
    is_flat: bool,
) -> Tensor:
    """Returns y + (down ⊙ shares) Bᵀ.

    Args:
        y: The operation's value, (rows, positions, out).
        down: The branches' values behind A, (rows, positions, ranks).
        B: Of all experts, (out, ranks).
        experts: The number of the expert of each rank.
        scales: The scale of each expert.
        scalings: The scalings of the call, as the next three are described in `shares_at`.
        key: See there.
        layer: See there.
        is_flat: See there.
    """
    shares = shares_at(down, scalings, key, layer, is_flat)
    if shares is None:
        return y
    shares = shares.to(down.dtype)
    shares = shares * (scales[0] if len({*scales}) == 1 else shares.new_tensor(scales))
    return y + F.linear(down * shares[..., experts], B)
