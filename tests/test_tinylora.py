"""TinyLoRA's groups of layers, what it takes from the weights, and its embeddings."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from matrix_uses import TARGETS, build, inputs
from oracle import EMBEDDING, moved
from torch import nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, TinyLoraConfig, get_peft_model, get_peft_model_state_dict
from graphpeft.graph.template import template_of


def adapted(**options: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(build(), TinyLoraConfig(**{"u": 5, "target_modules": TARGETS} | options))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_layers_are_grouped_as_in_peft(share: float):
    base = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)))
    groups = []
    for library in (peft, graphpeft):
        config = library.TinyLoraConfig(weight_tying=share, target_modules="all-linear")
        model: Any = library.get_peft_model(nn.Sequential(*base, nn.Linear(4, 2)), config)
        groups.append({key for key in library.get_peft_model_state_dict(model) if "tinylora_v" in key})
    assert groups[0] == groups[1]


def test_layers_of_a_group_train_one_vector():
    model = adapted(weight_tying=0.5)
    vectors = [model.get_submodule(path).default.tinylora_v for path in TARGETS]
    assert vectors[0] is not vectors[1]
    assert vectors[1] is vectors[2]
    assert len([p for p in model.parameters() if p.requires_grad]) == 2


def test_factors_are_the_first_singular_vectors_of_the_weight_without_other_adapters():
    model: Any = moved(get_peft_model(build(), LoraConfig(r=2, target_modules=["0"])))
    model.merge_adapter()
    model.add_adapter("tiny", TinyLoraConfig(r=3, u=5, target_modules=["0"]))
    factors = model[0].tiny
    U, S, V = torch.linalg.svd(build().get_submodule("0").weight)
    torch.testing.assert_close(factors.tinylora_B @ factors.tinylora_A, U[:, :3] * S[:3] @ V[:3])
    assert not factors.tinylora_A.requires_grad


def test_without_an_initialisation_the_vector_is_zero():
    model = adapted(init_weights=False)
    assert torch.equal(model(inputs()), build()(inputs()))


def test_another_adapter_has_to_save_its_projections_as_well():
    model = adapted()
    with pytest.raises(AdaptError, match="save_projection is False, and True of the adapter 'default'"):
        model.add_adapter("other", TinyLoraConfig(save_projection=False, target_modules=TARGETS))
    model.add_adapter("other", TinyLoraConfig(projection_seed=1, target_modules=TARGETS))


def test_an_embedding_looks_up_rows_of_a_factor():
    model: Any = moved(get_peft_model(EMBEDDING.build(), TinyLoraConfig(u=5, target_modules=["0"])))
    template: Any = template_of(model[0])
    assert [str(node.target) for node in template.graphs[0].nodes].count(str(F.embedding)) == 2
    factors = model[0].default
    R = torch.einsum("u,ujk->jk", factors.tinylora_v, factors.tinylora_P)
    table = EMBEDDING.build().get_submodule("0").weight + factors.tinylora_B @ R @ factors.tinylora_A
    torch.testing.assert_close(
        model(*EMBEDDING.inputs()), EMBEDDING.build().get_submodule("1")(table[EMBEDDING.inputs()[0]])
    )


def test_keys_are_pefts_with_a_vector_for_each_group():
    found = [key for key in get_peft_model_state_dict(adapted(weight_tying=0.5)) if "tinylora_v" in key]
    assert found == ["base_model.tinylora_v.0", "base_model.tinylora_v.1"]
