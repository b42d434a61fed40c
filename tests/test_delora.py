"""DeLoRA: the size of the change is bounded by λ, and the lengths of the weight's columns are those of the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import LINEAR

from graphpeft import DeloraConfig, get_peft_model
from graphpeft.graph.template import template_of


def adapted(**options: Any) -> Any:
    return get_peft_model(LINEAR.build(), DeloraConfig(target_modules=["0"], **{"r": 2, **options}))


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_the_size_of_the_factors_changes_nothing(factor: float):
    model = adapted(init_weights=False)
    before = model(*LINEAR.inputs())
    with torch.no_grad():
        model[0].default.delora_A *= factor
        model[0].default.delora_B /= factor
    torch.testing.assert_close(model(*LINEAR.inputs()), before)


def test_the_change_is_bounded_by_lambda():
    model = adapted(init_weights=False, delora_lambda=0.5)
    base: Any = LINEAR.build()
    lengths = base[0].weight.detach().norm(dim=0)
    change = (model.merge_and_unload()[0].weight - base[0].weight).detach() / lengths
    assert 0 < change.norm() <= 0.5


def test_patterns_give_layers_other_ranks_and_lambdas():
    model = adapted(rank_pattern={"0": 3}, lambda_pattern={"0": 7})
    assert model[0].default.delora_A.shape == (3, 6)
    assert model[0].default.delora_lambda.item() == 7


def test_a_second_adapter_measures_the_base_and_not_what_the_first_makes_of_it():
    model = adapted(init_weights=False)
    model.merge_adapter()
    model.add_adapter("second", DeloraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model[0].second.delora_w_norm, model[0].default.delora_w_norm)


def test_a_bias_is_trained_beside():
    trained = [name for name, p in adapted(bias="delora_only").named_parameters() if p.requires_grad]
    assert "0.default.bias" in trained


def test_a_linear_layer_never_makes_the_change_of_its_weight():
    template: Any = template_of(adapted()[0])
    for graph in template.graphs:
        assert not [node for node in graph.nodes if not node.users and node.op != "output"]
