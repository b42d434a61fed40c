"""LoRA that is trained as it will be merged: where merging rounds the changed weight, the forward rounds it, too.

    y = operation(x, Q(W + s B A)) + b        Q is taken as the identity in the backward

Q is a function of weights that the config names, or what has quantised the layer's own weight. The gradient is the
straight-through estimator: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv
1308.3432. Merging writes Q(W + s B A) itself, so a merged model is the one that was trained. PEFT has nothing like it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft._torch import without_compiler
from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.recorded import as_node
from graphpeft.methods.lora.init.initialisation import RANDOM
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import Mergeable, OperationRule
from graphpeft.sites import quantisers
from graphpeft.sites.site import LeafSite, Site
from graphpeft.wording import shown

Quantiser = Callable[[Tensor], Tensor]

OWN = "own"
"""In place of a function: what has quantised a layer's own weight. Other weights are merged as they are."""


def as_merged(lora: Any, site: Site | LeafSite, quantiser: Quantiser | str | None) -> Any:
    """Returns LoRA's rule for a site, as `merged_quantiser` wants it."""
    if quantiser is None or (quantiser == OWN and isinstance(site, Site)):
        return lora
    return RoundedLeaf(lora, quantiser) if isinstance(site, LeafSite) else Rounded(lora, quantiser)


def check(quantiser: Any) -> None:
    """Raises ValueError for what `merged_quantiser` can't be. A graph calls a function by its name."""
    is_function = callable(quantiser) and hasattr(quantiser, "__name__")
    if not (quantiser is None or quantiser == OWN or is_function):
        what = "write a function that calls it" if callable(quantiser) else "give a function of a weight"
        raise ValueError(f"merged_quantiser is {shown(quantiser)}, and no function; {what}, or {OWN!r}")


def in_file(quantiser: Quantiser | str | None) -> str | None:
    """Returns the value of `merged_quantiser` that a file holds; it warns of a function, which none can hold."""
    if quantiser is None or quantiser == OWN:
        return quantiser  # pyright: ignore[reportReturnType]
    warnings.warn(
        f"merged_quantiser={shown(quantiser)} is a function, which a file can't hold: to train further, load it "
        "with a config that has it, as in from_pretrained(…, config=config, is_trainable=True)",
        PeftWarning,
        stacklevel=6,
    )
    return None


@dataclass(frozen=True)
class Rounded(OperationRule, Mergeable):
    """The change of a weight that a function rounds when it is merged.

    Attributes:
        direction: LoRA's rule for the same site.
        quantiser: The function.
    """

    scales: ClassVar[tuple[str, ...]] = ("lora_scaling",)

    direction: Any
    quantiser: Any

    def check(self, site: Any, config: Any) -> str | None:
        """Refuses the same as LoRA, what can't be merged, and what has no part in a sum that is rounded."""
        reason = self.direction.check(site, config) or _refusal(config)
        if reason is None and (unmergeable := site.unmergeable or self.unmergeable(site)):
            reason = f"merged_quantiser is for weights into which an adapter can be merged: {unmergeable}"
        return reason

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        return self.direction.parameters(site, config)

    def constants(self, site: Any, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return self.direction.constants(site, config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as LoRA does, and tries the function on the weight."""
        self.direction.initialise(parameters, site, config, module)
        _try(self.quantiser, own_parameter(module, site.attribute), site.label)

    def rewrite(
        self, x: Any, y: Any, weight: Any, bias: Any, operation: Any, lora_A: Any, lora_B: Any, lora_scaling: Any
    ) -> Any:
        """Returns the operation's value with the rounded weight."""
        result = operation.apply(x, self._rounded(weight, lora_A, lora_B, lora_scaling))
        return (result if bias is None else result + operation.beside_outputs(bias)).to(y.dtype)

    def delta(self, weight: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns Q(W + s B A) − W, in double precision, so that the sum with W is the rounded weight to the bit."""
        return self._rounded(weight, lora_A, lora_B, lora_scaling).double() - weight.double()

    def unmergeable(self, site: Any) -> str | None:
        """Refuses the same as LoRA."""
        return self.direction.unmergeable(site)

    def _rounded(self, weight: Any, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        change = self.direction.delta(lora_A, lora_B, lora_scaling)
        changed = (weight + change).to(weight.dtype)
        without_gradient = changed.detach()
        rounded = _applied(self.quantiser, without_gradient)
        return rounded.detach() + (changed - without_gradient)


@dataclass(frozen=True)
class RoundedLeaf(OperationRule, Mergeable):
    """The change of a quantised weight, whose sum with the weight is quantised as the weight was.

    Attributes:
        direction: LoRA's rule for the same call.
        quantiser: The option `merged_quantiser`.
    """

    scales: ClassVar[tuple[str, ...]] = ("lora_scaling",)
    rounds_sum: ClassVar[bool] = True

    direction: Any
    quantiser: Any

    def check(self, site: LeafSite, config: Any) -> str | None:
        """Refuses the same as LoRA, functions, and layers that round more than their weight."""
        if not site.is_recoded or self.quantiser != OWN:
            return f"it is {site.kind}, and merged_quantiser is for weights that can be quantised anew, by {OWN!r}"
        if site.quantises_inputs:
            return f"it is {site.kind}, and it quantises its inputs, too; leave merged_quantiser out"
        return self.direction.check(site, config) or _refusal(config)

    def parameters(self, site: LeafSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns A and B."""
        return self.direction.parameters(site, config)

    def constants(self, site: LeafSite, config: Any) -> Mapping[str, float]:
        """Returns the scale."""
        return self.direction.constants(site, config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws A and B as LoRA does."""
        self.direction.initialise(parameters, site, config, module)

    def rewrite(
        self,
        x: Any,
        y: Any,
        codes: Any,
        lora_A: Any,
        lora_B: Any,
        *,
        state: Any = None,
        lora_scaling: Any,
    ) -> Any:
        """Adds what the numbers of new codes change."""
        change = self.direction.delta(lora_A, lora_B, lora_scaling)
        without_gradient = change.detach()
        rounded = as_node(_rounded_change, without_gradient, codes, state) + (change - without_gradient)
        return (y + F.linear(x.to(change.dtype), rounded)).to(y.dtype)

    def delta(self, lora_A: Any, lora_B: Any, lora_scaling: Any) -> Any:
        """Returns s B A, since merging quantises the sum anyway."""
        return self.direction.delta(lora_A, lora_B, lora_scaling)


def _refusal(config: Any) -> str | None:
    """Returns the reason why an option has no place beside `merged_quantiser`, or None."""
    if config.lora_dropout and not config.inference_mode:
        return "lora_dropout drops elements of a branch's input, and merged_quantiser leaves no branch; set it to 0"
    if config.init_lora_weights not in RANDOM:
        return f"init_lora_weights={config.init_lora_weights!r} isn't for merged_quantiser; leave one of them out"
    odd = next((name for name in ("use_dora", "lora_bias") if getattr(config, name)), None)
    return None if odd is None else f"{odd}=True isn't for merged_quantiser; leave one of them out"


def _applied(quantiser: Quantiser, weight: Any) -> Any:
    """Returns a function's value, as a node of the graph for a proxy."""
    return as_node(quantiser, weight) if isinstance(weight, fx.Proxy) else quantiser(weight)


@without_compiler("libraries quantise in ways that no compiler follows, as in the move to a device")
def _rounded_change(change: Tensor, codes: Any, state: Any) -> Tensor:
    """Returns how the numbers of codes change if a change is added and the sum is quantised."""
    numbers = quantisers.numbers_of(codes, state)
    return (quantisers.requantised(codes, state, numbers + change) - numbers).to(change.dtype)


@torch.no_grad()
def _try(quantiser: Quantiser, weight: Tensor, label: str) -> None:
    """Raises AdaptError unless a function gives a weight of the shape and dtype that it is given."""
    if weight.is_meta:
        return
    found: Any = quantiser(weight.detach().clone())
    if isinstance(found, Tensor) and (found.shape, found.dtype) == (weight.shape, weight.dtype):
        if torch.isfinite(found).all():
            return
        what = "infinities or NaNs"
    elif isinstance(found, Tensor):
        what = f"a tensor of shape {tuple(found.shape)} and {found.dtype}"
    else:
        what = f"a {type(found).__name__}"
    raise AdaptError(
        f"merged_quantiser gives {what} for the weight of {label}, of shape {tuple(weight.shape)} and {weight.dtype}; "
        "let it return a weight of the same shape and dtype, of finite numbers"
    )
