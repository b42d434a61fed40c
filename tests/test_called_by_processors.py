"""Layers that a module uses by way of others: processors, strategies and modules, given the module or a layer."""

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

from graphpeft import LoraConfig, PeftModel, explain, get_peft_model
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("code", "sites")

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Calling:
    """A processor as those of diffusers: it decides on what it is given, and calls the layers."""

    def __call__(self, attention: Any, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        if x.ndim == 4:
            x = x.flatten(1, 2)
        more = x if more is None else more
        query, key, value = attention.inner(x), attention.to_k(more), attention.to_v(more)
        return F.scaled_dot_product_attention(query, key.to(attention.inner.weight.dtype), value)


class Reading:
    def __call__(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, attention.inner.weight)


class ReadingByName:
    def __call__(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, getattr(getattr(attention, "inner"), "weight"))  # noqa: B009


class ByAnother:
    def __init__(self) -> None:
        self.other = Reading()

    def __call__(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        return self.other(attention, x)


class Strategy:
    def run(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, attention.inner)

    def _product(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x @ layer.weight.T


class ReadingModule(nn.Module):
    def forward(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, attention.inner.weight)


class ReadingLayer(nn.Module):
    def forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight)


class Attention(nn.Module):
    def __init__(self, processor: Any = None) -> None:
        super().__init__()
        self.inner, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
        self.processor = processor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class WithStrategy(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor.run(self, x)


class HandingTheLayerOn(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self.inner, x)


class HandingOnByAnotherName(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.inner
        return self.processor(layer, x)


class WithProcessors(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for processor in self.processor:
            x = processor(self, x)
        return x


SHARED = Reading()


class WithSharedProcessor(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SHARED(self, x)


class WithNewProcessor(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Reading()(self, x)


READERS: dict[str, Callable[[], nn.Module]] = {
    "a processor": lambda: Attention(Reading()),
    "a processor that reads by name": lambda: Attention(ReadingByName()),
    "a processor of a processor": lambda: Attention(ByAnother()),
    "a strategy": lambda: WithStrategy(Strategy()),
    "processors in a list": lambda: WithProcessors([Reading(), Calling()]),
    "a global processor": WithSharedProcessor,
    "a new processor in each call": WithNewProcessor,
    "a module": lambda: Attention(ReadingModule()),
    "a module that is given the layer": lambda: HandingTheLayerOn(ReadingLayer()),
    "a module that is given the layer by another name": lambda: HandingOnByAnotherName(ReadingLayer()),
}

OPTIONS: Any = {"target_modules": ["inner"], "r": 2, "lora_alpha": 7, "init_lora_weights": False}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make()


@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_a_weight_that_others_read_is_adapted_where_they_read_it(make: Callable[[], nn.Module]):
    model = _seeded(make)
    base, classes = model(X), [type(module) for module in model.modules()]
    adapted: Any = get_peft_model(model, LoraConfig(**OPTIONS))
    found = adapted(X)
    assert not torch.allclose(found, base)
    found.square().sum().backward()
    assert all(tensor.grad is not None for tensor in model.parameters() if tensor.requires_grad)
    merged = copy.deepcopy(adapted).merge_and_unload()
    laws.require_close(merged(X), found, 1e-5, "merged and adapted")
    unloaded = adapted.unload()
    assert torch.equal(unloaded(X), base)
    assert [type(module) for module in unloaded.modules()] == classes


def test_a_layer_that_a_processor_calls_is_adapted_as_that_layer(tmp_path: Path):
    model = _seeded(lambda: nn.Sequential(Attention(Calling()), Attention(Calling())))
    options = {**OPTIONS, "target_modules": ["inner", "to_v"], "lora_dropout": 0.1}
    report = explain(model, LoraConfig(**options))
    assert [(row.site.label, row.site.op.__name__, row.site.region) for row in report.adapted] == [
        (name, "Linear", name) for name in ("0.inner", "0.to_v", "1.inner", "1.to_v")
    ]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(model, str(tmp_path))
    laws.require_close(ours(X), theirs(X), 1e-5, "ours and theirs")


def test_a_processor_set_later_that_calls_its_layers_is_adapted_too():
    model: Any = _seeded(lambda: Attention(Calling()))
    adapted: Any = get_peft_model(model, LoraConfig(**OPTIONS))
    before = adapted(X)
    model.processor = Calling()
    assert torch.equal(adapted(X), before)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner if x.sum() > 0 else x


def test_the_report_names_modules_that_run_their_own_code_on_changed_weights():
    report = explain(_seeded(lambda: nn.Sequential(Deciding())), LoraConfig(**OPTIONS))
    assert "runs its own code on changed weights" in str(report)
    [reason] = [row.site.own_code for row in report.adapted]
    assert reason is not None
    assert reason.startswith("0 can't become a graph: ")


def test_a_processor_multiplies_by_the_changed_weight_without_dropout():
    model: Any = _seeded(lambda: Attention(ReadingModule()))
    get_peft_model(model, LoraConfig(**OPTIONS, lora_dropout=0.5)).train()
    found, adapted = model(X), model.eval()(X)
    laws.require_close(found, adapted, 1e-6, "in training and in evaluation")
    laws.require_close(model.merge_and_unload()(X), adapted, 1e-6, "merged and adapted")


class CallingAndReading(nn.Module):
    """It calls its layer, or multiplies by its weight, as the attention of DeBERTa does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        if other is None:
            return sum(self.inner(x).chunk(2, dim=-1), start=torch.zeros(1)) if len(x) else x
        weights = self.inner.weight.chunk(2, dim=0)
        return sum((other @ weight.T for weight in weights), start=torch.zeros(1))


@pytest.mark.parametrize("given", [(X,), (X, 2 * X)])
def test_a_layer_that_is_called_and_whose_weight_is_read_is_changed_in_both(given: tuple[torch.Tensor, ...]):
    model = _seeded(CallingAndReading)
    base = model(*given)
    adapted: Any = get_peft_model(model, LoraConfig(**OPTIONS))
    found = adapted(*given)
    assert not torch.allclose(found, base)
    laws.require_close(adapted.merge_and_unload()(*given), found, 1e-5, "merged and adapted")


class Window(nn.Module):
    """An attention with an optional mask, which reads the weights of its layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        scores = F.linear(x, self.inner.weight, self.inner.bias)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ x.transpose(1, 2)[:, :, :1]


class CallingIt(nn.Module):
    def __init__(self, *masks: float | None) -> None:
        super().__init__()
        self.window, self.masks = Window(), masks

    def forward(self, x: torch.Tensor) -> Any:
        return sum(self.window(x, None if mask is None else x * mask) for mask in self.masks)


@pytest.mark.parametrize("masks", [(None,), (0.5,), (0.5, 0.25), (None, 0.5), (0.5, None)])
def test_a_module_that_reads_a_weight_is_called_with_and_without_optional_arguments(masks: tuple[float | None, ...]):
    model = _seeded(lambda: CallingIt(*masks))
    config = LoraConfig(**OPTIONS)
    adapted: Any = get_peft_model(model, config, example_inputs=(X,))
    found = adapted(X)
    laws.require_close(adapted.merge_and_unload()(X), found, 1e-5, "merged and adapted")


def test_a_unet_is_adapted_without_example_inputs_and_equals_pefts(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8))
    options = {**OPTIONS, "target_modules": ["to_q", "to_v", "to_out.0"]}
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(model, str(tmp_path))
    laws.require_close(ours(*inputs).sample, theirs(*inputs).sample, 1e-5, "ours and theirs")
