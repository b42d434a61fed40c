"""Weights of recurrent layers, of the model itself, of modulated and dynamic convolutions, and complex ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphpeft import AdaptError, LoraConfig, PeftModel, explain, get_peft_model
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.quick("targeting", "methods/lora/kernels.py"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

Make = Callable[[], nn.Module]


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module, features: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(features, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class OfCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRUCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(x.shape[0], 5)
        for step in x.unbind(1):
            state = self.rnn(step, state)
        return self.head(state)


class Product(nn.Module):
    """A model with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Modulated(nn.Module):
    """A convolution whose kernel is scaled for each image, and normed, as in StyleGAN 2."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(shape)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, channels, height, width = x.shape
        scale = 1 + self.scale(x.mean((2, 3))).view(images, 1, channels, 1, 1)
        kernel = self.weight * scale
        kernel = kernel * torch.rsqrt(kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        out = F.conv2d(x.reshape(1, -1, height, width), kernel.flatten(0, 1), groups=images, padding=1)
        return out.view(images, -1, height, width)


class Dynamic(nn.Module):
    """A convolution that mixes several kernels for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.choice = nn.Parameter(torch.randn(3, 6, 4, 3, 3)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, _, height, width = x.shape
        shares = self.choice(x.mean((2, 3))).softmax(-1)
        kernel = torch.einsum("bk,koihw->boihw", shares, self.weight)
        out = F.conv2d(x.reshape(1, -1, height, width), kernel.flatten(0, 1), groups=images, padding=1)
        return out.view(images, -1, height, width)


class Complex(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(self.layer(x.to(torch.cfloat)))


SEQUENCES, IMAGES = torch.randn(2, 3, 4), torch.randn(2, 4, 5, 5)

RECURRENT: dict[str, Make] = {
    "LSTM": lambda: Recurrent(nn.LSTM(4, 5, batch_first=True), 5),
    "LSTM, both ways, two layers": lambda: Recurrent(
        nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True), 10
    ),
    "LSTM with a projection": lambda: Recurrent(nn.LSTM(4, 5, batch_first=True, proj_size=3), 3),
    "GRU": lambda: Recurrent(nn.GRU(4, 5, batch_first=True), 5),
    "RNN": lambda: Recurrent(nn.RNN(4, 5, batch_first=True), 5),
}

OTHERS: dict[str, tuple[Make, str, torch.Tensor]] = {
    **{name: (make, "rnn", SEQUENCES) for name, make in RECURRENT.items()},
    "cell": (OfCells, "rnn", SEQUENCES),
    "the model's own": (Product, "weight", SEQUENCES),
    "modulated": (lambda: nn.Sequential(Modulated(6, 4, 3, 3)), "0", IMAGES),
    "modulated, stored with one dimension more": (lambda: nn.Sequential(Modulated(1, 6, 4, 3, 3)), "0", IMAGES),
    "dynamic": (lambda: nn.Sequential(Dynamic()), "0", IMAGES),
    "complex": (lambda: Complex(nn.Linear(4, 5, dtype=torch.cfloat)), "layer", SEQUENCES),
    "complex convolution": (lambda: Complex(nn.Conv2d(4, 5, 3, dtype=torch.cfloat)), "layer", IMAGES),
}


def _model(make: Make) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


def _config(target: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": [target], "r": 2, "lora_alpha": 7, "init_lora_weights": False, **more})


@pytest.mark.parametrize(("make", "target", "x"), OTHERS.values(), ids=OTHERS)
def test_an_adapter_acts_merges_and_comes_off(make: Make, target: str, x: torch.Tensor, tmp_path: Path):
    model = _model(make)
    base = model(x)
    fresh: Any = get_peft_model(_model(make), _config(target, init_lora_weights=True))
    laws.require_close(fresh(x), base, 1e-6, "a fresh adapter and the base")
    adapted: Any = get_peft_model(_model(make), _config(target))
    found = adapted(x)
    assert not torch.allclose(found, base)
    adapted.train()(x).square().sum().backward()
    assert all(tensor.grad is not None for tensor in adapted.parameters() if tensor.requires_grad)
    adapted.eval().save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(_model(make), tmp_path)
    laws.require_close(loaded(x), found, 1e-5, "loaded and saved")
    laws.require_close(copy.deepcopy(loaded).merge_and_unload()(x), found, 1e-5, "merged and adapted")
    laws.require_close(adapted.unload()(x), base, 1e-6, "unloaded and the base")


@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
def test_the_file_of_a_recurrent_layer_is_pefts_of_its_parameters(make: Make, tmp_path: Path):
    adapted: Any = get_peft_model(_model(make), _config("rnn"))
    adapted.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(_model(make), str(tmp_path))
    laws.require_close(theirs(SEQUENCES), adapted(SEQUENCES), 1e-5, "theirs and ours")


def test_a_recurrent_layer_has_an_adapter_for_each_of_its_matrices():
    report = explain(_model(RECURRENT["LSTM with a projection"]), _config("rnn"))
    assert [row.site.label for row in report.adapted] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_hr_l0"]


def test_a_recurrent_layer_and_one_of_its_matrices_are_named_together():
    config = LoraConfig(target_modules=["rnn", "weight_ih_l0", "head"])
    labels = [row.site.label for row in explain(_model(RECURRENT["GRU"]), config).adapted]
    assert sorted(labels) == ["head", "rnn.weight_hh_l0", "rnn.weight_ih_l0"]


def test_dropout_and_dora_are_refused_at_a_kernel_that_a_model_computes_with():
    model = _model(OTHERS["modulated"][0])
    for options, reason in (
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 drops"),
        ({"use_dora": True}, "use_dora=True is"),
    ):
        before = laws.snapshot(model)
        with pytest.raises(AdaptError, match=reason):
            get_peft_model(model, _config("0", **options))
        laws.require_unchanged(model, before, "a refused adaptation")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_adapters_of_kernels_are_combined(kind: str):
    adapted: Any = get_peft_model(_model(OTHERS["dynamic"][0]), _config("0"), "one")
    adapted.add_adapter("two", _config("0"))
    weight = adapted.get_parameter("0.weight")
    original = weight.detach().clone()
    changes = []
    for name in ("one", "two"):
        adapted.merge_adapter([name])
        changes.append(weight.detach() - original)
        adapted.unmerge_adapter()
    adapted.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both", combination_type=kind, svd_rank=4)
    adapted.merge_adapter(["both"])
    if kind != "linear":  # which adds the factors, and so isn't the sum
        laws.require_close(weight - original, 0.5 * changes[0] + 2 * changes[1], 1e-4, "combined, and the sum of both")
    assert not torch.allclose(weight, original)


class OwnWeight(nn.Module):
    """A parameter of the model itself whose name is that of layers' weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.route, self.left = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.left(self.route(x) @ self.weight)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": "weight|route"}, {"target_modules": "weight"}, {"target_parameters": [".weight"]}],
    ids=str,
)
def test_a_parameter_of_the_model_itself_is_found_again_and_no_other_of_its_name(options: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = OwnWeight()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, init_lora_weights=False, **options))
    wanted = {site.site.weight for site in model.adapter_report().adapted}
    assert "weight" in wanted
    assert "left.weight" not in wanted
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {site.site.weight for site in loaded.adapter_report().adapted} == wanted
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x))


class Experts(nn.Module):
    """Multiplies by a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,edf->bef", x, self.w)


def test_dropout_and_dora_together_are_refused_at_a_stack_as_in_peft():
    options: dict[str, Any] = {"r": 2, "target_parameters": ["0.w"], "lora_dropout": 0.5, "use_dora": True}
    with pytest.raises(AdaptError, match=r"lora_dropout=0\.5 drops elements"):
        get_peft_model(nn.Sequential(Experts()), LoraConfig(**options))
    with pytest.raises(ValueError, match="does not work with"):
        peft.get_peft_model(nn.Sequential(Experts()), peft.LoraConfig(**options))
