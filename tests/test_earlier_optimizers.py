"""Optimizers that were made before their model was adapted."""

import gc
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphpeft import LoraConfig, PeftModel, get_peft_model
from graphpeft.model import earlier_optimizers

pytestmark = pytest.mark.quick("model")

CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
NOTHING = "has frozen weights of Sequential and nothing of its trained adapter"


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    found: nn.Module = get_peft_model(model, LoraConfig(**CONFIG, **options))
    return found


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def texts(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step(optimizer, model)
    return [str(each.message) for each in found]


def test_its_first_step_warns_once_that_it_changes_nothing() -> None:
    model = base()
    optimizer = torch.optim.AdamW(model.parameters())
    adapted(model)
    assert [bool(re.search(f"this AdamW {NOTHING}", text)) for text in texts(optimizer, model)] == [True]
    assert texts(optimizer, model) == []


def test_one_for_a_model_that_an_adapter_is_loaded_into_afterwards_warns(tmp_path: Path) -> None:
    adapted(base()).save_pretrained(tmp_path)  # type: ignore[operator]
    model = base()
    optimizer = torch.optim.SGD(model.parameters())
    PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert len(texts(optimizer, model)) == 1


@pytest.mark.parametrize(
    "parameters",
    [list, lambda all_of_them: [each for each in all_of_them if each.requires_grad]],
    ids=["all", "trained"],
)
def test_one_that_is_made_afterwards_is_silent(parameters: Any) -> None:
    model = adapted(base())
    assert texts(torch.optim.SGD(parameters(model.parameters())), model) == []


def test_one_for_weights_that_are_trained_beside_the_adapter_is_silent() -> None:
    model = base()
    optimizer = torch.optim.SGD(model[1].parameters())  # type: ignore[index]
    adapted(model)
    model[1].requires_grad_(True)  # type: ignore[index]
    assert texts(optimizer, model) == []


def test_one_that_also_has_weights_that_are_trained_later_warns() -> None:
    model = base()
    optimizer = torch.optim.SGD(model.parameters())
    adapted(model)
    model[1].requires_grad_(True)  # type: ignore[index]
    assert len(texts(optimizer, model)) == 1


def test_one_of_another_model_is_silent_and_the_next_is_still_looked_at() -> None:
    model, other = base(), base()
    optimizer, of_other = (torch.optim.SGD(each.parameters()) for each in (model, other))
    adapted(model)
    assert texts(of_other, other) == []
    assert len(texts(optimizer, model)) == 1


def test_optimizers_of_two_watched_models_step_one_after_another() -> None:
    models = [adapted(base()), adapted(base())]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    for _ in range(2):
        for optimizer, model in zip(optimizers, models, strict=True):
            assert texts(optimizer, model) == []


def test_nothing_stays_when_it_was_found_or_the_model_is_gone() -> None:
    model = adapted(base())
    assert model in earlier_optimizers._WATCHED
    texts(torch.optim.SGD(model.parameters()), model)
    assert model not in earlier_optimizers._WATCHED
    reference = weakref.ref(adapted(base()))
    gc.collect()
    assert reference() is None
