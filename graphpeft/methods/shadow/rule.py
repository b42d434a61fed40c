"""Shadow at a layer of a decoder: its input is moved by the shadow state, and its output moves that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import BoundaryRule
from graphpeft.sites.site import CallSite

INPUT = "shadow_states"
"""The argument of a call by which layers read the states."""


class States:
    """The shadow states of a call: before each layer, and behind the last.

    Args:
        first: The state before the first, (rows, positions, features).
        layers: The number of layers.
    """

    def __init__(self, first: Tensor, layers: int) -> None:
        self.before: list[Tensor | None] = [first, *[None] * layers]


@dataclass(frozen=True)
class Shadow(BoundaryRule):
    """The change of a layer's input, and of the state behind it.

    Attributes:
        hidden: The name of the argument with the hidden states.
        dtype: The dtype of the layer's own parameters.
    """

    call_inputs: ClassVar[tuple[str, ...]] = (INPUT,)

    hidden: str
    dtype: torch.dtype

    def parameters(self, site: CallSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the factors of the change, the two small networks, and at the first layer the small model."""
        wide, r, inner = config.small_model.width, config.r, config.update_hidden_size or config.r
        found = {
            "shadow_down": ParameterSpec((r, wide), "shadow_down.default.weight"),
            "shadow_up": ParameterSpec((wide, r), "shadow_up.default.weight"),
        }
        for name in ("transform", "gate"):
            for layer, shape in (("0", (inner, wide)), ("2", (wide, inner))):
                key = f"shadow_update_{name}.default.{layer}"
                found[f"shadow_{name}_{layer}_weight"] = ParameterSpec(shape, f"{key}.weight")
                found[f"shadow_{name}_{layer}_bias"] = ParameterSpec(shape[:1], f"{key}.bias")
        if config.numbers[site.owner] == len(config.numbers) - 1:
            # nothing reads the state behind the last layer, so these would never get a gradient
            networks = {
                name: spec for name, spec in found.items() if name.startswith(("shadow_transform", "shadow_gate"))
            }
            found |= {name: spec._replace(is_trained=False, is_counted=True) for name, spec in networks.items()}
        found = {name: spec._replace(dtype=self.dtype) for name, spec in found.items()}
        return found if config.numbers[site.owner] else {**found, **config.small_model.parameters}

    def constants(self, site: CallSite, config: Any) -> Mapping[str, float]:
        """Returns α, the probability of dropout, the layer's number, and the key of the adapter's states."""
        number = config.numbers[site.owner]
        return {
            "shadow_alpha": config.shadow_alpha,
            "shadow_dropout": config.shadow_dropout,
            "shadow_layer": number,
            "shadow_key": config.small_model.key,
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Draws the small model at the first layer, and then the layer's own networks, as PEFT does."""
        if not config.numbers[site.owner]:
            config.small_model.draw(parameters)
        layers = [nn.Linear(*reversed(parameters[name].shape), bias=False) for name in ("shadow_down", "shadow_up")]
        parameters["shadow_down"].copy_(layers[0].weight)
        parameters["shadow_up"].copy_(layers[1].weight)
        if config.init_weights:
            parameters["shadow_up"].zero_()
        for name in ("transform", "gate"):
            for layer in "02":
                weight, bias = (parameters[f"shadow_{name}_{layer}_{kind}"] for kind in ("weight", "bias"))
                drawn = nn.Linear(weight.shape[1], weight.shape[0])
                weight.copy_(drawn.weight)
                bias.copy_(drawn.bias)

    def enter(
        self,
        inputs: Mapping[str, Any],
        training: Any,
        shadow_states: Any,
        shadow_layer: Any,
        shadow_key: Any,
        shadow_down: Any,
        shadow_up: Any,
        shadow_alpha: Any,
        shadow_dropout: Any,
    ) -> dict[str, Any]:
        """Returns the hidden states with what the shadow state changes of them."""
        hidden = inputs[self.hidden]
        factors = shadow_down, shadow_up, shadow_alpha, shadow_dropout
        return {self.hidden: injected(hidden, shadow_states, shadow_key, shadow_layer, *factors, training)}

    def leave(
        self,
        output: Any,
        shadow_states: Any,
        shadow_layer: Any,
        shadow_key: Any,
        shadow_transform_0_weight: Any,
        shadow_transform_0_bias: Any,
        shadow_transform_2_weight: Any,
        shadow_transform_2_bias: Any,
        shadow_gate_0_weight: Any,
        shadow_gate_0_bias: Any,
        shadow_gate_2_weight: Any,
        shadow_gate_2_bias: Any,
    ) -> Any:
        """Returns the output, and moves the shadow state by it."""
        transform = (
            shadow_transform_0_weight,
            shadow_transform_0_bias,
            shadow_transform_2_weight,
            shadow_transform_2_bias,
        )
        gate = shadow_gate_0_weight, shadow_gate_0_bias, shadow_gate_2_weight, shadow_gate_2_bias
        return advanced(output, shadow_states, shadow_key, shadow_layer, *transform, *gate)

    def unmergeable(self, site: Any) -> str:
        """Returns that no weight does what it does."""
        return "a small model runs beside the layers, which no weight does"


def state_before(states: Mapping[int, States], key: int, layer: int, hidden: Tensor) -> Tensor:
    """Returns the shadow state before a layer."""
    state = states[key].before[layer] if isinstance(states, Mapping) and key in states else None
    if state is None:
        raise TypeError(f"layer {layer} of a Shadow adapter is called without those before it; call the whole model")
    if state.shape != hidden.shape:
        raise ValueError(
            f"the shadow state has the shape {tuple(state.shape)}, and a layer is given {tuple(hidden.shape)}; pass "
            "whole sequences"
        )
    return state


@recorded
def injected(
    hidden: Tensor,
    states: Mapping[int, States],
    key: int,
    layer: int,
    down: Tensor,
    up: Tensor,
    alpha: float,
    dropout: float,
    training: bool,
) -> Tensor:
    """Returns hidden + α · up(down(dropout(hidden − state)))."""
    delta = (hidden - state_before(states, key, layer, hidden)).to(down.dtype)
    delta = F.dropout(delta, dropout, training) if dropout else delta
    return hidden + (alpha * F.linear(F.linear(delta, down), up)).to(hidden.dtype)


@recorded
def advanced(output: Any, states: Mapping[int, States], key: int, layer: int, *networks: Tensor) -> Any:
    """Returns a layer's output, and puts the state behind the layer in its place: (1 − g) · state + g · t."""
    hidden = output[0] if isinstance(output, tuple) else output
    state = state_before(states, key, layer, hidden)
    h = hidden.to(networks[0].dtype)
    candidate, gate = _network(h, *networks[:4]), torch.sigmoid(_network(h, *networks[4:]))
    states[key].before[layer + 1] = ((1 - gate) * state.to(h.dtype) + gate * candidate).to(state.dtype)
    return output


def _network(h: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(h, first, first_bias)), second, second_bias)
