"""What is generated for property tests: models with convolutions, half precision, configs that fit, single failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faulty_rules import Fault, Product, Rows
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

import graphpeft
from graphpeft import AdaptError, BoundaryRule, DeltaRule, ParameterSpec
from graphpeft.testing import LawError, assert_traced_is_adapted_alike
from graphpeft.testing.generated_models import Model, cases
from graphpeft.testing.strategies import adaptations, refusals_discarded

pytestmark = pytest.mark.usefixtures("own_registry")

quick = settings(max_examples=300, database=None, derandomize=True, phases=(Phase.generate,))


def registered(name: str, rule: type, **options: Any) -> str:
    return graphpeft.register(Fault("", "", rule, **options).config_class(name)).peft_type


class AnyShape(Product):
    adapts = DeltaRule.adapts

    def parameters(self, site: Any, config: Any) -> Any:
        return {"A": ParameterSpec(site.matrix_shape, key="A")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["A"].zero_()

    def delta(self, A: Any) -> Any:  # type: ignore[override]
        return 1 * A


class Gate(BoundaryRule):
    def parameters(self, site: Any, config: Any) -> Any:
        return {"gate": ParameterSpec((1,), key="gate")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["gate"].fill_(1)

    def leave(self, output: Any, gate: Any) -> Any:
        return output * gate.to(output.dtype)


def adapted_kinds(drawn: Any) -> set[type]:
    case, config = drawn
    model = graphpeft.get_peft_model(case.build(), config, example_inputs=case.inputs)
    owners = [one.site.owner for one in model._peft_adapters.by_name["default"].sites]
    return {type(case.build().get_submodule(owner)) for owner in owners}


def test_a_method_for_convolutions_gets_models_with_some():
    find(adaptations(registered("any", AnyShape)), lambda drawn: nn.Conv1d in adapted_kinds(drawn), settings=quick)


def test_a_method_that_refuses_convolutions_gets_none_as_targets():
    @given(drawn=adaptations(registered("product", Product)))
    @settings(quick, max_examples=30)
    def test(drawn: Any) -> None:
        assert nn.Conv1d not in adapted_kinds(drawn)

    test()


def test_a_method_for_boundaries_gets_modules_of_other_kinds():
    method = registered("gate", Gate, adapts_boundaries=True, starts_as_identity="within rounding")
    find(adaptations(method), lambda drawn: bool({nn.LayerNorm, nn.Sequential} & adapted_kinds(drawn)), settings=quick)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_are_in_half_precision_too(dtype: torch.dtype):
    drawn = find(adaptations("LORA"), lambda drawn: drawn[0].inputs[0].dtype == dtype, settings=quick)
    assert {parameter.dtype for parameter in drawn[0].build().parameters()} == {dtype}


def test_a_refusal_discards_an_example():
    seen = []

    @given(case=cases())
    @settings(quick, max_examples=10)
    def test(case: Any) -> None:
        seen.append(case)
        with refusals_discarded():
            if len(seen) % 2:
                raise AdaptError("it isn't for this model")
        assert isinstance(case.build(), Model)

    test()
    assert len(seen) > 10


def test_a_failure_in_a_graphs_code_is_one_failure_and_comes_again():
    config_class = graphpeft.register(Fault("", "", Rows).config_class("rows"))

    @given(size=st.integers(4, 6))
    @settings(max_examples=10, database=None)
    def test(size: int) -> None:
        def build() -> nn.Module:
            return nn.Sequential(nn.Conv1d(3, 5, 1))

        config = config_class(target_modules=["0"])
        assert_traced_is_adapted_alike(build, config, (torch.ones(1, 3, size + (size == 5)),))

    # Rows takes convolutions, whose features are in another dimension; each trace has code in a file of another name
    with pytest.raises(LawError, match="RuntimeError: The size of tensor a"):
        test()
