"""Layers whose weight is computed from others: by weight and spectral norm, pruning, parametrizations."""

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
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import remove_weight_norm, weight_norm

from graphpeft import AdaptError, LoraConfig, PeftModel, explain, get_peft_model, own_weight
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.quick("graph", "sites"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = layer, nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.layer(x))


Make = Callable[[], Any]

LAYERS: dict[str, Make] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 6)),
    "weight norm of a convolution": lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1)),
    "weight norm of a grouped convolution": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, groups=2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "hook of weight norm": lambda: weight_norm(nn.Linear(4, 6)),
    "hook of weight norm of a convolution": lambda: weight_norm(nn.Conv1d(4, 6, 3, dilation=1)),
    "hook of spectral norm": lambda: spectral_norm(nn.Conv1d(4, 6, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 6), "weight", 0.2),
}

TRANSPOSED: dict[str, Make] = {
    "weight norm of a transposed convolution": lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3)),
    "hook of weight norm of a transposed convolution": lambda: weight_norm(nn.ConvTranspose2d(4, 6, 3)),
}


def _model(make: Make) -> Any:
    # PyTorch copies no layer with such a hook
    torch.manual_seed(1)
    return Net(make()).eval()


def _input(model: Any) -> torch.Tensor:
    dimensions = model.layer.weight.ndim - 2
    sizes = (2, 4, *(7,) * dimensions) if dimensions else (2, 3, 4)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(2))


def _options(**more: Any) -> dict[str, Any]:
    return {"target_modules": ["layer"], "r": 2, "lora_alpha": 7, "init_lora_weights": False, **more}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_the_numbers_and_files_are_pefts(make: Make, use_dora: bool, tmp_path: Path):
    x, options = _input(_model(make)), _options(use_dora=use_dora)
    theirs: Any = peft.get_peft_model(_model(make), peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours: Any = PeftModel.from_pretrained(_model(make), str(tmp_path / "theirs"))
    laws.require_close(ours(x), theirs(x), 1e-5, "ours and theirs")
    torch.manual_seed(3)
    ours = get_peft_model(_model(make), LoraConfig(**options)).eval()
    ours.save_pretrained(str(tmp_path / "ours"))
    again: Any = peft.PeftModel.from_pretrained(_model(make), str(tmp_path / "ours"))
    laws.require_close(again(x), ours(x), 1e-5, "theirs and ours")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", [*LAYERS.values(), *TRANSPOSED.values()], ids=[*LAYERS, *TRANSPOSED])
def test_an_adapter_acts_on_the_computed_weight_and_leaves_it_again(make: Make, use_dora: bool):
    model = _model(make)
    x, cls, keys = _input(model), type(model.layer), list(model.state_dict())
    base = model(x)
    fresh: Any = get_peft_model(_model(make), LoraConfig(target_modules=["layer"], r=2, use_dora=use_dora)).eval()
    laws.require_close(fresh(x), base, 1e-6, "a fresh adapter and the base")
    adapted: Any = get_peft_model(model, LoraConfig(**_options(use_dora=use_dora)))
    found = adapted.eval()(x)
    assert not torch.allclose(found, base)
    found.square().sum().backward()
    trained = [tensor for tensor in adapted.parameters() if tensor.requires_grad]
    assert len(trained) == 2 + use_dora
    assert all(tensor.grad is not None for tensor in trained)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), base)
    assert torch.equal(adapted.unload()(x), base)
    assert type(model.layer) is cls
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_merging_is_refused_since_the_weight_is_computed_anew(make: Make):
    adapted: Any = get_peft_model(_model(make), LoraConfig(**_options()))
    x = _input(adapted)
    before = adapted(x)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(AdaptError, match=r"its weight is computed by \w+ from other tensors, and no parameter"):
            merge()
    assert torch.equal(adapted(x), before)


def test_an_initialisation_that_replaces_the_weight_is_refused():
    with pytest.raises(AdaptError, match="its weight is computed by WeightNorm"):
        get_peft_model(_model(LAYERS["weight norm"]), LoraConfig(**_options(init_lora_weights="pissa")))


def test_an_initialisation_by_the_weight_reads_the_computed_one():
    model = _model(LAYERS["weight norm"])
    adapted: Any = get_peft_model(model, LoraConfig(**_options(init_lora_weights="mica")))
    assert adapted(_input(model)).shape == (2, 3, 6)


def test_a_parametrized_layer_is_copied_with_its_adapter():
    adapted: Any = get_peft_model(_model(LAYERS["weight norm of a convolution"]), LoraConfig(**_options()))
    x = _input(adapted)
    copied = copy.deepcopy(adapted)
    assert torch.equal(copied(x), adapted(x))
    with torch.no_grad():
        copied.layer.parametrizations.weight.original0 *= 2
    assert not torch.allclose(copied(x), adapted(x))


def test_two_adapters_act_together_and_change_with_the_tensors_below():
    adapted: Any = get_peft_model(_model(LAYERS["hook of weight norm"]), LoraConfig(**_options()), "one")
    adapted.add_adapter("two", LoraConfig(**_options(r=3)))
    x = _input(adapted)
    alone = {}
    for name in ("one", "two"):
        adapted.set_adapter(name)
        alone[name] = torch.atanh(adapted(x))
    with adapted.disable_adapter():
        base = torch.atanh(adapted(x))
    adapted.set_adapter(["one", "two"])
    laws.require_close(torch.atanh(adapted(x)), alone["one"] + alone["two"] - base, 1e-4, "both and each")


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_dtype_is_that_of_the_tensors_from_which_a_weight_is_computed(make: Make):
    # a hook's weight keeps the old dtype until the next call
    adapted: Any = get_peft_model(_model(make).double(), LoraConfig(**_options()))
    assert {tensor.dtype for tensor in adapted.parameters() if tensor.requires_grad} == {torch.float64}
    assert adapted(_input(adapted).double()).dtype == torch.float64


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_first_values_follow_the_weight_that_is_computed_from_loaded_tensors(make: Make):
    # a hook's weight keeps the old values until the next call
    loaded, run = _model(make), _model(make)
    state = {name: tensor if "mask" in name else 3 * tensor for name, tensor in loaded.state_dict().items()}
    for model in (loaded, run):
        model.load_state_dict(state)
    run(_input(run))
    config = LoraConfig(target_modules=["layer"], r=2, lora_alpha=7, use_dora=True)
    magnitudes = [
        next(tensor for name, tensor in get_peft_model(model, config).named_parameters() if "magnitude" in name)
        for model in (loaded, run)
    ]
    torch.testing.assert_close(*magnitudes)


class Causal(nn.Conv1d):
    """A convolution with a forward of its own, as libraries of sequences have it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(input, (2, 0)))


class Reader(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


OWN_FORWARDS: dict[str, Make] = {
    "hook of weight norm": lambda: weight_norm(Causal(4, 6, 3)),
    "weight norm": lambda: parametrizations.weight_norm(Causal(4, 6, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(Causal(4, 6, 3)),
}


@pytest.mark.parametrize("make", OWN_FORWARDS.values(), ids=OWN_FORWARDS)
def test_a_layer_of_its_own_forward_is_adapted_by_itself(make: Make, tmp_path: Path):
    base: Any = _model(make)
    x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2))
    y = base.layer(x)
    adapted: Any = get_peft_model(_model(make), LoraConfig(**_options()))
    A, B = adapted.layer.default.lora_A, adapted.layer.default.lora_B
    change = F.conv1d(F.conv1d(F.pad(x, (2, 0)), A), B) * (7 / 2)
    laws.require_close(adapted.layer(x), y + change, 1e-5, "the layer and the sum")
    adapted.save_pretrained(str(tmp_path))
    loaded: Any = PeftModel.from_pretrained(_model(make), str(tmp_path))
    assert torch.equal(loaded(x), adapted(x))
    assert torch.equal(adapted.unload().layer(x), y)


def test_a_computed_weight_that_a_module_around_reads_is_adapted_there():
    def make() -> nn.Module:
        return Reader(parametrizations.weight_norm(nn.Linear(4, 6)))

    base = _model(make)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    y = base.layer(x)
    adapted: Any = get_peft_model(_model(make), LoraConfig(**_options(target_modules=["inner"])))
    holder = adapted.layer.inner.default
    laws.require_close(adapted.layer(x), y + x @ (holder.lora_B @ holder.lora_A).T * (7 / 2), 1e-5, "reader and sum")


def test_the_hook_can_be_removed_from_an_adapted_layer():
    adapted: Any = get_peft_model(_model(LAYERS["hook of weight norm of a convolution"]), LoraConfig(**_options()))
    x = _input(adapted)
    before = adapted(x)
    remove_weight_norm(adapted.layer)
    laws.require_close(adapted(x), before, 1e-5, "without the hook and with it")


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_is_a_parameter_by_now_is_merged_into(how: str):
    config = LoraConfig(**_options())
    adapted: Any = get_peft_model(_model(LAYERS["hook of weight norm of a convolution"]), config)
    x = _input(adapted)
    with pytest.raises(AdaptError, match="its weight is computed by WeightNorm"):
        adapted.merge_adapter()
    remove_weight_norm(adapted.layer)
    before, weight = adapted(x), own_weight(adapted.layer).detach().clone()
    merged = adapted.merge_and_unload() if how == "merge_and_unload" else adapted
    if how == "merge_adapter":
        adapted.merge_adapter()
    assert not torch.equal(own_weight(adapted.layer), weight)
    laws.require_close(merged(x), before, 1e-5, "merged and adapted")
    if how == "merge_adapter":
        adapted.unmerge_adapter()
        assert torch.equal(own_weight(adapted.layer), weight)
        assert torch.equal(adapted(x), before)


def test_the_modules_that_compute_a_weight_are_no_targets():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh())
    report = explain(model, LoraConfig(target_modules=["0"]))
    assert [row.site.label for row in report.adapted] == ["0"]
    assert not report.refused


def test_a_tensor_from_which_a_weight_is_computed_is_named_as_a_parameter_and_merged():
    model = _model(LAYERS["weight norm"])
    x = _input(model)
    base = model(x)
    config = LoraConfig(target_parameters=["original1"], target_modules=[], r=2, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config)
    found = adapted(x)
    assert not torch.allclose(found, base)
    laws.require_close(adapted.merge_and_unload()(x), found, 1e-6, "merged and adapted")


def test_all_linear_names_normed_layers():
    report = explain(_model(LAYERS["weight norm"]), LoraConfig(target_modules="all-linear"))
    assert [row.site.label for row in report.adapted] == ["layer"]


def test_a_vocoder_of_transformers_has_pefts_numbers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=4,
        upsample_initial_channel=16,
        upsample_rates=[2],
        upsample_kernel_sizes=[4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 1]],
    )
    torch.manual_seed(1)
    model = transformers.SpeechT5HifiGan(config).eval()
    model.apply_weight_norm()
    options = {"target_modules": ["conv_pre", "convs1.0", "convs2.1"], "r": 2, "init_lora_weights": False}
    report = explain(model, LoraConfig(**options))
    assert [row.site.label for row in report.adapted] == ["conv_pre", "resblocks.0.convs1.0", "resblocks.0.convs2.1"]
    state, x = model.state_dict(), torch.randn(1, 6, 4)
    other = transformers.SpeechT5HifiGan(config).eval()
    other.apply_weight_norm()
    other.load_state_dict(state)
    theirs: Any = peft.get_peft_model(other, peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(model, str(tmp_path))
    laws.require_close(ours(x), theirs(x), 1e-4, "ours and theirs")
