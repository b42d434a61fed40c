"""PEANuT: activations by their names in Transformers, and what the network reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import LINEAR, moved
from transformers.activations import ACT2FN

from graphpeft import LoraConfig, PeanutConfig, get_peft_model, own_weight
from graphpeft.methods.peanut import _ACTIVATIONS, hidden

WITH_PARAMETERS = ("prelu", "xielu")


def test_all_activations_without_parameters_are_there():
    assert {*_ACTIVATIONS} == {*ACT2FN} - {*WITH_PARAMETERS}


@pytest.mark.parametrize("name", _ACTIVATIONS)
def test_an_activation_is_the_one_of_transformers(name: str):
    x = torch.linspace(-12, 12, 97)
    torch.testing.assert_close(_ACTIVATIONS[name](x), ACT2FN[name](x))


def test_the_network_reads_the_weight_of_the_base_beside_another_adapter():
    model: Any = get_peft_model(LINEAR.build(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("network", PeanutConfig(r=2, scaling=3.0, target_modules=["0"], init_weights=False))
    model.set_adapter(["default", "network"])
    moved(model)
    layer = model[0]
    network, lora = layer.network, layer.default
    h = hidden(own_weight(layer), network.peanut_A, "relu")
    change = 3 * network.peanut_B @ h.T + 4 * lora.lora_B @ lora.lora_A
    (x,) = LINEAR.inputs()
    torch.testing.assert_close(model(x), torch.tanh(x @ (own_weight(layer) + change).T + layer.bias))


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_an_activation_with_parameters_is_refused(name: str):
    with pytest.raises(ValueError, match=f"act_fn '{name}' has parameters of its own, which would be neither trained"):
        PeanutConfig(act_fn=name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"act_fn": "cosine"}, "act_fn 'cosine' is unknown; choose one of gelu"),
        ({"depth": -1}, "depth must be a whole number from 0 on"),
        ({"r": 0}, "r must be a positive integer"),
    ],
)
def test_values_that_can_not_be_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        PeanutConfig(**options)
