"""What `target_modules="all-linear"` stands for: exactly the linear layers, whatever else has names that end so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphpeft import AdaptError, LoraConfig, PeftModel, explain, get_peft_model
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("targeting", "sites/layer_kinds.py")


class Mixed(nn.Module):
    """In its parts, "0" is a linear layer, a convolution and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(), nn.Linear(5, 4))
        self.mlp = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 6)), nn.Tanh())
        self.head = nn.ModuleDict({"0": nn.Linear(6, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head["0"](self.mlp(self.features(x)))


X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))


def _adapted_by(report: Any) -> list[str]:
    assert not report.refused
    return [row.site.label for row in report.adapted]


def test_names_of_a_sequence_hit_no_other_layers():
    assert _adapted_by(explain(Mixed(), LoraConfig(target_modules="all-linear"))) == [
        "features.2",
        "mlp.0.1",
        "head.0",
    ]


def test_the_names_of_a_plain_sequence_hit_no_sequences_inside():
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.ReLU(), nn.Conv1d(3, 3, 1)), nn.Linear(4, 2))
    report = explain(model, LoraConfig(target_modules="all-linear"))
    assert _adapted_by(report) == ["0", "2"]


def test_the_file_names_the_same_layers_in_peft(tmp_path: Path):
    torch.manual_seed(1)
    model = Mixed()
    adapted: Any = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2, lora_alpha=7)
    )
    adapted.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    laws.require_close(theirs(X), adapted(X), 1e-5, "theirs and ours")
    ours: Any = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(ours(X), adapted(X))


def test_where_no_other_name_ends_so_the_config_lists_the_names_as_pefts_does():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x))

    theirs = peft.get_peft_model(Plain(), peft.LoraConfig(target_modules="all-linear"))
    ours: Any = get_peft_model(Plain(), LoraConfig(target_modules="all-linear"))
    of_theirs: Any = theirs.peft_config["default"]
    assert ours.peft_config["default"].target_modules == of_theirs.target_modules


class Linear(nn.Module):
    """A library's own linear layer, as PyTorch Geometric has one."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class StackedLinear(nn.Module):
    """No linear layer, but many of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bri,rio->bro", x, self.weight)


def test_a_librarys_own_linear_layer_is_one(tmp_path: Path):
    torch.manual_seed(1)
    model = nn.Sequential(StackedLinear(), Linear(4, 6), nn.Linear(6, 2))
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2, lora_alpha=7)
    assert _adapted_by(explain(model, config)) == ["2", "1.weight"]
    adapted: Any = get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    laws.require_close(theirs(X), adapted(X), 1e-5, "theirs and ours")
    laws.require_close(copy.deepcopy(adapted).merge_and_unload()(X), adapted(X), 1e-5, "merged and adapted")


def test_a_model_without_linear_layers_is_told_what_layers_it_has():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(), nn.BatchNorm1d(3), nn.Sequential(nn.Conv1d(3, 2, 1)))
    before = laws.snapshot(model)
    with pytest.raises(AdaptError, match=r"a Sequential has no linear layers; it has Conv1d \(0\), BatchNorm1d \(2\)"):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))
    laws.require_unchanged(model, before, "a refused adaptation")


def test_parameters_may_be_named_where_there_are_no_linear_layers():
    report = explain(
        nn.Sequential(StackedLinear()), LoraConfig(target_modules="all-linear", target_parameters=["weight"])
    )
    assert _adapted_by(report) == ["0.weight"]
