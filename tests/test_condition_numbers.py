"""Targets by the condition numbers of weights are those that PEFT finds."""

from __future__ import annotations

from typing import Any

import peft.helpers
import pytest
import torch
from models import LLAMA
from torch import Tensor, nn

from graphpeft import KappaTuneSelector, LoraConfig, find_kappa_target_modules, get_peft_model

pytestmark = pytest.mark.quick("targeting")


class Experts(nn.Module):
    """Two experts in one parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(2, 8, 6))
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.gate_up_proj @ self.down_proj).sum(0))


def models() -> list[Any]:
    torch.manual_seed(0)
    return [LLAMA.build(), nn.Sequential(Experts(), Experts())]


@pytest.mark.parametrize("options", [{"top_p": 0.3}, {"num_modules": 3}, {"threshold": 40.0}, {}])
def test_targets_are_those_of_peft(options: dict[str, float]) -> None:
    for model in models():
        ours, theirs = KappaTuneSelector(model), peft.helpers.KappaTuneSelector(model, show_progress=False)
        assert ours.get_best_targets(**options) == theirs.get_best_targets(**options)  # pyright: ignore[reportArgumentType]
        found = ours.get_best_target_parameters(**options)  # pyright: ignore[reportArgumentType]
        assert found == theirs.get_best_target_parameters(**options)  # pyright: ignore[reportArgumentType]


def test_what_is_found_is_a_configs_targets() -> None:
    for model in models():
        found = find_kappa_target_modules(model, top_p=0.4)
        assert found == peft.helpers.find_kappa_target_modules(model, top_p=0.4, show_progress=False)
        adapted = get_peft_model(model, LoraConfig(r=2, **found))  # pyright: ignore[reportArgumentType]
        assert len(adapted.targeted_module_names) == len(found["target_modules"] or ())
        # adapters change nothing about it
        assert find_kappa_target_modules(adapted, top_p=0.4) == found


def test_large_matrices_and_other_names_are_left_out() -> None:
    (_, model) = models()
    assert KappaTuneSelector(model, max_dim_size_to_analyze=7).get_best_target_parameters() == []
    assert KappaTuneSelector(model, max_dim_size_to_analyze=7).get_best_targets() != []
    found = KappaTuneSelector(model, moe_param_suffixes=(".down_proj",)).get_best_target_parameters()
    assert set(found) == {"0.down_proj", "1.down_proj"}


def test_a_choice_that_says_two_things_is_refused() -> None:
    selector = KappaTuneSelector(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pass one of top_p, num_modules and threshold"):
        selector.get_best_targets(top_p=0.1, num_modules=1)
    with pytest.raises(ValueError, match=r"top_p is 1\.5, and a share"):
        selector.get_best_targets(top_p=1.5)
