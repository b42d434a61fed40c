"""The rule of all prompt methods: an encoder computes virtual tokens, and a placement inserts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.caches import CACHES
from graphpeft.methods.prompts.encoders import Encoder
from graphpeft.methods.prompts.placement import Placement
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import BoundaryRule
from graphpeft.sites.site import CallSite


@dataclass(frozen=True)
class PromptRule(BoundaryRule):
    """Virtual tokens at one boundary.

    Attributes:
        encoder: Computes them.
        placement: Inserts them.
    """

    held_in: ClassVar[str] = "prompt_encoder"

    # an empty cache tells that a sequence begins, and one that a prefix has filled tells nothing
    reads_as_given: ClassVar[tuple[str, ...]] = CACHES

    encoder: Encoder
    placement: Placement

    @property
    def spends(self) -> tuple[str, ...]:
        """The arguments that the placement spends."""
        return self.placement.spends

    @property
    def more_inputs(self) -> tuple[str, ...]:
        """The arguments that both ask for."""
        return (*self.encoder.asks, *self.placement.asks)

    def check(self, site: CallSite, config: Any) -> str | None:
        """Returns the reason why the module can't take the virtual tokens, or None."""
        return self.placement.check(site)

    def parameters(self, site: CallSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the encoder's parameters."""
        return self.encoder.parameters(config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Fills new parameters with the encoder's first values."""
        self.encoder.initialise(parameters, config, module)

    def enter(
        self,
        inputs: Mapping[str, Any],
        training: Any,
        word_embeddings: Any = None,
        config: Any = None,
        layers: Any = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Computes the virtual tokens and places them."""
        asked = {name: inputs[name] for name in self.encoder.asks}
        prompt = self.encoder.encode(parameters, training, **asked)
        if layers is not None and self.placement.spends:
            prompt = kept_in_cache(prompt, layers, training)
        return self.placement.enter(prompt, inputs, word_embeddings, config)

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the placement's value of the output."""
        return self.placement.leave(output, inputs, entered)


@recorded
def kept_in_cache(prompt: Tensor, layers: nn.Module, training: bool) -> Tensor:
    """Returns a prompt."""
    modules = (layers, *layers.children())
    if training and torch.is_grad_enabled() and any(getattr(each, "gradient_checkpointing", False) for each in modules):
        raise RuntimeError(
            "a prefix works through the cache, which gradient checkpointing switches off: call "
            "gradient_checkpointing_disable() on the model, or train another adapter, as LoRA or prompt tuning"
        )
    return prompt
