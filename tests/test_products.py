"""Rules of users whose change is a product, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import moved
from torch import nn
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import AdaptError, Diagonal, ParameterSpec, Product, ProductRule, TargetedConfig, get_peft_model

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Tensors(ProductRule):
    zeros_change_nothing = True
    adapts_calls = True

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        shapes = {"A": (2, site.in_features), "B": (site.out_features, 2), "d": (site.out_features,), "s": ()}
        return {name: ParameterSpec(shape, name) for name, shape in shapes.items()}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        for tensor in parameters.values():
            tensor.normal_()


class LowRank(Tensors):
    def product(self, A: Any, B: Any) -> Product:
        return Product((B, A))


class OneDiagonal(Tensors):
    def product(self, d: Any) -> Product:
        return Product((Diagonal(d),))


class OneMatrix(Tensors):
    def product(self, A: Any, B: Any) -> Product:
        return Product((B @ A,))


class TrainedScale(Tensors):
    def product(self, A: Any, B: Any, s: Any) -> Product:
        return Product((B, A), s)


class WithBias(LowRank):
    def bias_delta(self, d: Any) -> Any:
        return d


class InTraining(Tensors):
    def product(self, A: Any, B: Any, training: Any) -> Product:
        return Product((B * (1 + training), A))


RULES = [LowRank, OneDiagonal, OneMatrix, TrainedScale, WithBias, InTraining]


@dataclass(kw_only=True)
class ProductConfig(TargetedConfig):
    peft_type = "PRODUCT_OF_A_TEST"
    adapts_leaves = True

    rule: Any = None

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return self.rule()


def adapted(rule: type, layer: nn.Module) -> Any:
    torch.manual_seed(0)
    return moved(get_peft_model(nn.Sequential(layer), ProductConfig(rule=rule, target_modules=["0"])))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: Conv1D(6, 6)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_applied_is_what_is_merged(rule: type, make: Any) -> None:
    model = adapted(rule, make()).eval()
    found = model(X)
    found.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(X), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rows_have_what_each_adapter_gives_by_itself(rule: type, training: bool) -> None:
    model = adapted(rule, nn.Linear(6, 6)).train(training)
    model.add_adapter("other", ProductConfig(rule=rule, target_modules=["0"]))
    moved(model, 5)
    names = ["default", "other", "__base__", "other"]
    found = model(X, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(X)[row]
        else:
            model.set_adapter(name)
            expected = model(X)[row]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


class Opaque(nn.Module):
    in_features = out_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.ones(6, 6, dtype=torch.int8))

    def forward(self, x: Any) -> Any:
        return x @ self.codes.to(x.dtype)


def test_a_change_of_the_bias_that_a_call_would_lose_is_refused() -> None:
    with pytest.raises(AdaptError, match=r"the bias of a call isn't known; see Product\.adds_bias"):
        adapted(WithBias, Opaque())
    assert adapted(LowRank, Opaque())(X).shape == X.shape


def test_a_product_asks_for_weights_that_its_rule_hands_on_alone() -> None:
    class OfBase(Tensors):
        def product(self, base: Any, A: Any) -> Product:
            return Product((base, A))

    with pytest.raises(AdaptError, match="product of OfBase asks for 'base'"):
        adapted(OfBase, nn.Linear(6, 6))


def test_a_function_of_that_name_is_another_rules_own_matter() -> None:
    class Alien(graphpeft.DeltaRule):
        def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
            return {"w": ParameterSpec(site.matrix_shape, "w")}

        def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
            parameters["w"].zero_()

        def product(self, left: Any, right: Any) -> Any:
            return left * right

        def delta(self, w: Any) -> Any:
            return self.product(w, 2)

    assert adapted(Alien, nn.Linear(6, 6))(X).shape == X.shape
