"""A traced model is in training where its model's own `train()` and `eval()` put it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphpeft import GuardError, LoraConfig, TraceError, get_peft_model, trace
from graphpeft.graph.paths import modules_by_path
from graphpeft.testing import laws

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Frozen(nn.Module):
    """A backbone whose normalisation and first stage never train."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def train(self, mode: bool = True):
        super().train(mode)
        self.first.eval()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def forward(self, x):
        return self.second(self.first(x))


class ReturningNothing(Frozen):
    """Trains as some of timm's do."""

    def train(self, mode: bool = True):  # pyright: ignore[reportIncompatibleMethodOverride]
        super().train(mode)


class Deciding(Frozen):
    """Goes another way in training, in a module that is never in training, too."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def train(self, mode: bool = True):
        super().train(mode)
        self.gate.train(False)
        return self

    def forward(self, x):
        x = super().forward(x) * 2 if self.training else super().forward(x)
        return self.gate(x)


class Gate(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else x


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(self.backbone(x))


class Evaluating(nn.Sequential):
    """Has an `eval()` of its own, which leaves dropout on."""

    def eval(self):
        super().eval()
        for module in self.modules():
            module.training = isinstance(module, nn.Dropout)
        return self


BUILDS = {
    "frozen normalisation": lambda: Detector(Frozen()),
    "that decides": lambda: Detector(Deciding()),
    "that returns nothing": lambda: Detector(ReturningNothing()),
    "by itself": lambda: Deciding(),
}


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[kind]()


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in modules_by_path(model).items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", BUILDS)
def test_train_and_eval_do_what_those_of_the_model_do(kind, training):
    laws.assert_traced_trains_as_the_model(lambda: built(kind), (X,), modes=(training,), strict=True)
    model = built(kind).train(training)
    traced: Any = trace(model, (X,))
    for mode in (not training, training):
        expected = modes_of(model.train(mode))
        found = modes_of(traced.train(mode))
        assert found == {path: expected[path] for path in found}
        torch.manual_seed(1)
        expected = copy.deepcopy(model)(X)
        torch.manual_seed(1)
        assert torch.equal(copy.deepcopy(traced)(X), expected)


def test_an_eval_of_its_own_is_told_from_train_of_false():
    traced: Any = trace(Detector(Evaluating(nn.Linear(4, 4), nn.Dropout(0.5))), (X,))
    assert not any(modes_of(traced.eval()).values())
    assert traced.backbone.eval().get_submodule("1").training
    assert not traced.backbone.train(False).get_submodule("1").training


def test_a_part_of_a_traced_model_is_put_into_training_as_that_of_the_model():
    model: Any = built("frozen normalisation").eval()
    traced: Any = trace(model, (X,))
    model.backbone.train()
    traced.backbone.train()
    assert modes_of(traced) == {path: mode for path, mode in modes_of(model).items() if path in modes_of(traced)}
    assert traced.get_submodule("backbone.second.2").training
    assert not traced.get_submodule("backbone.first.2").training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda traced: pickle.loads(pickle.dumps(traced))])
def test_so_do_copies_and_adapted_ones(copied):
    traced: Any = trace(built("that decides"), (X,))
    adapted = get_peft_model(copied(traced), LoraConfig(target_modules=["second.0"], r=2, lora_alpha=6))
    assert modes_of(adapted.train()) == modes_of(traced.train())
    assert modes_of(adapted.eval()) == modes_of(traced.eval())
    assert not adapted.train().get_submodule("backbone.second.1").training


def test_noting_the_modes_touches_no_tensor_of_the_model():
    class Merging(nn.Linear):
        def train(self, mode: bool = True):
            self.weight.requires_grad_(mode)
            with torch.no_grad():
                self.weight.mul_(2)
            return super().train(mode)

        def forward(self, input):
            return input @ self.weight * 2 if self.training else input @ self.weight

    model = nn.Sequential(Merging(4, 4))
    before = laws.snapshot(model)
    trace(model, (X,))
    laws.require_unchanged(model, before, "tracing")


def test_a_train_that_fails_on_a_copy_is_refused():
    class Failing(nn.Module):
        def train(self, mode: bool = True):
            raise ValueError("no")

        def forward(self, x):
            return x

    with pytest.raises(TraceError, match=r"train\(\) and eval\(\) of Failing.*ValueError: no"):
        trace(nn.Sequential(Failing()), (X,))


class Choosing(nn.Module):
    """Freezes its normalisation where a flag says so, as the backbones of mmdetection do."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.norm_eval, self.scale = nn.Linear(4, 4), nn.BatchNorm1d(4), True, 2.0

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.norm_eval:
            self.norm.eval()
        return self

    def forward(self, x):
        return self.norm(self.linear(x)) * self.scale


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_flag_that_the_models_train_asks_for_is_that_of_the_trace(copied):
    traced = copied(trace(Detector(Choosing()), (X,)))
    modes = {path: module.training for path, module in traced.named_modules()}
    traced.backbone.scale = 3.0
    traced.backbone.norm_eval = False
    for change in (traced.eval, traced.train, lambda: traced.train(False)):
        with pytest.raises(GuardError, match=r"backbone.norm_eval, which train\(\) and eval\(\) there ask for"):
            change()
        assert {path: module.training for path, module in traced.named_modules()} == modes
    traced.backbone.norm_eval = True
    assert not traced.train().backbone.norm.training


class Popping(nn.Module):
    """Takes values out of a list that it makes, and asks for its length; a mode decides, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.n = nn.Linear(4, 4), 2

    def forward(self, x):
        left = [None] * self.n
        before = len(left)
        while left:
            state = left.pop(0)
            x = self.layer(x if state is None else x + state)
        return x * before if self.training else x


def test_a_list_that_a_forward_empties_is_full_when_the_other_mode_is_recorded() -> None:
    x, model = torch.ones(2, 4), nn.Sequential(Popping())
    traced: Any = trace(model.eval(), (x,))
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(x), model.train(mode)(x))
