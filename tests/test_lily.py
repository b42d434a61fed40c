"""Lily on whole models: which layers share what, here and in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from contracts.lily import blocks
from models import tiny_llama
from oracle import perturb
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn

import graphpeft
from graphpeft import AdaptError, LilyConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from graphpeft.methods.lily import _ends

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through", "ignore:::peft")


X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


def by_both(base: Any, **options: Any) -> tuple[Any, Any]:
    given = {"r": 3, "stride_A": 2, "num_B": 3, "init_weights": False, **options}
    models: list[Any] = []
    for library in (peft, graphpeft):
        model = base()
        torch.manual_seed(3)
        models.append(library.get_peft_model(model, library.LilyConfig(**given)))  # type: ignore[attr-defined]
    return models[0], models[1]


def owners(model: Any) -> list[int]:
    """Returns for each A and B the place of the first layer that has it."""
    found = []
    for name in ("lily_A", "lily_B"):
        parameters = [p for path, p in model.named_parameters(remove_duplicate=False) if f".{name}" in path]
        first = {id(parameter): place for place, parameter in reversed(list(enumerate(parameters)))}
        found += [first[id(parameter)] for parameter in parameters]
    return found


@pytest.mark.parametrize(
    "named",
    [
        ["up", "gate"],
        ["up", "down", "gate"],
        r".*\.(up|gate)",
        r"\d\.\w+",
        "all-linear",
        [f"{block}.{name}" for block in range(5) for name in ("up", "down")],
        [f"{block}.{name}" for block in range(8) for name in ("up", "down", "gate")],
    ],
    ids=str,
)
def test_the_layers_share_that_share_in_peft(named: Any, tmp_path: Path):
    def base() -> nn.Module:
        return blocks(8)

    theirs, ours = by_both(base, target_modules=named)
    assert owners(ours) == owners(theirs)
    torch.testing.assert_close(ours(X), theirs(X))
    perturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(X), ours(X))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again: Any = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    assert owners(again) == owners(ours)
    assert torch.equal(again(X), ours(X))


def test_of_many_names_those_ends_are_left_that_pefts_has():
    paths = [path for path, _ in tiny_llama().named_modules() if path]
    linear = [path for path in paths if path.endswith("_proj")]
    for named in (linear, linear[:9], [*linear, "lm_head"], [*linear[::2], "up_proj"]):
        others = [path for path in paths if path not in named and not path.endswith(tuple(f".{n}" for n in named))]
        expected = _find_minimal_target_modules(named, others)
        assert _ends(set(named), paths) == (expected if len(expected) < len(set(named)) else set(named))


def test_the_longest_of_several_ends_is_the_target():
    model: Any = get_peft_model(blocks(3), LilyConfig(r=2, target_modules=["up", "1.up"]))
    assert model.get_parameter("0.up.default.lily_B") is model.get_parameter("2.up.default.lily_B")
    assert model.get_parameter("0.up.default.lily_B") is not model.get_parameter("1.up.default.lily_B")


def test_a_file_whose_layers_should_share_and_do_not_is_refused(tmp_path: Path):
    model: Any = get_peft_model(blocks(), LilyConfig(r=2, target_modules=["up"]))
    values = get_peft_model_state_dict(model)
    values["base_model.model.1.up.lily_B.weight"] = torch.ones(4, 9)
    with pytest.raises(graphpeft.CheckpointError, match=r"other values for 1\.up\.default\.lily_B than for 0\.up"):
        graphpeft.set_peft_model_state_dict(model, values)


def test_gradients_of_all_layers_meet_in_what_they_share():
    theirs, ours = by_both(blocks, target_modules=["up", "gate"])
    for model in (theirs, ours):
        model(X).square().sum().backward()
    expected = {
        n.replace("base_model.model.", "").replace(".weight", ""): p
        for n, p in theirs.named_parameters(remove_duplicate=False)
    }
    for path in ("0.up", "2.gate"):
        for name in ("lily_A", "lily_B", "lily_router"):
            found = ours.get_parameter(f"{path}.default.{name}").grad
            torch.testing.assert_close(found, expected[f"{path}.{name}.default"].grad)


def test_other_uses_of_a_weight_are_refused():
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w.norm()

    with pytest.raises(AdaptError, match="Lily mixes its factors by the input of a linear operation"):
        get_peft_model(Norms(), LilyConfig(target_modules=["w"]))
