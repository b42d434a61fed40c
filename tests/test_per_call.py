"""LoRA with an adapter of its own for each call of a shared module."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from graphpeft import (
    AdaptError,
    LoraConfig,
    LoraPerCallConfig,
    PeftModel,
    explain,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    trace,
)
from graphpeft.testing import laws, verify


def albert() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "embedding_size": 8}
    config = AlbertConfig(vocab_size=30, num_hidden_layers=4, num_hidden_groups=1, num_attention_heads=2, **sizes)
    return AlbertModel(config)


class Shared(nn.Module):
    """The same layer in two places, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.tanh(self.layer(x))))


class Functional(nn.Module):
    """A weight that no layer holds, in two operations."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w)), self.w)


class Coded(nn.Module):
    """A layer whose weight is integers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 6
        self.register_buffer("codes", torch.randint(-100, 100, (6, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) / 100)  # type: ignore[operator]


def in_sequence(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        shared = layer()
        return nn.Sequential(shared, nn.Tanh(), shared)

    return build


class Case(NamedTuple):
    """A model with a shared module.

    Attributes:
        name: What it is called.
        make: Builds it.
        inputs: Its example inputs.
        targets: What to adapt.
        calls: What the sites are called.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    targets: tuple[str, ...]
    calls: tuple[str, ...]

    def build(self) -> Any:
        return copy.deepcopy(traced(self.name))

    def __str__(self) -> str:
        return self.name


@functools.cache
def traced(name: str) -> nn.Module:
    case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    return trace(case.make().eval(), case.inputs)


X = (torch.randn(4, 6),)
LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
CASES = [
    Case(
        "albert",
        albert,
        {"input_ids": torch.randint(0, 30, (4, 5))},
        ("query", "ffn"),
        tuple(f"{LAYER}.{name}.call_{number}" for name in ("attention.query", "ffn") for number in (1, 2, 3, 4)),
    ),
    Case("a layer called twice", Shared, X, ("layer", "last"), ("layer.call_1", "layer.call_2", "last")),
    Case("a sequence", in_sequence(lambda: nn.Linear(6, 6)), X, ("0",), ("0.call_1", "0.call_2")),
    Case("a parameter", Functional, X, ("w",), ("w.call_1", "w.call_2")),
    Case("a leaf", in_sequence(Coded), X, ("0",), ("0.call_1", "0.call_2")),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def adapted(case: Case, seed: int = 2, **options: Any) -> Any:
    model = case.build()
    torch.manual_seed(seed)
    return get_peft_model(model, config(case, **options))


def config(case: Case, **options: Any) -> LoraPerCallConfig:
    return LoraPerCallConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(case.targets), **options})


def run(model: nn.Module, case: Case, **options: Any) -> Tensor:
    found = model(**case.inputs, **options) if isinstance(case.inputs, dict) else model(*case.inputs, **options)
    return found if isinstance(found, Tensor) else found.last_hidden_state


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@each_case
def test_each_call_is_a_site(case):
    report = explain(case.build(), config(case))
    assert tuple(site.site.label for site in report.adapted) == case.calls
    assert all(label in str(report) for label in case.calls)


@each_case
def test_a_fresh_adapter_is_the_identity(case):
    assert torch.equal(run(adapted(case), case), run(case.build(), case))


@each_case
def test_with_equal_factors_it_is_the_shared_adapter_and_gradients_add_up_to_its(case):
    shared = get_peft_model(case.build(), LoraConfig(r=2, lora_alpha=3, target_modules=list(case.targets)))
    laws.perturbed(shared)
    model = adapted(case)
    own = factors(shared)
    with torch.no_grad():
        for name, tensor in factors(model).items():
            tensor.copy_(own[without_call(name)])
    assert torch.allclose(run(model, case), run(shared, case), atol=1e-6)
    for each in (model, shared):
        run(each, case).square().sum().backward()
    sums: dict[str, Tensor] = {}
    for name, tensor in factors(model).items():
        assert tensor.grad is not None
        sums[without_call(name)] = sums.get(without_call(name), torch.zeros(())) + tensor.grad
    assert sums.keys() == own.keys()
    for name, tensor in own.items():
        assert tensor.grad is not None
        assert torch.allclose(sums[name], tensor.grad, rtol=1e-4, atol=1e-5), name


def without_call(name: str) -> str:
    path, _, own = name.rpartition(".")
    for number in range(1, 5):
        own = own.replace(f"call_{number}_", "")
    return f"{path}.{own}" if path else own


def test_each_call_has_its_own_branch():
    case = CASES[1]
    model = adapted(case)
    laws.perturbed(model)
    (x,) = X
    scaling = 1.5

    def branch(h: Tensor, prefix: str, layer: Any) -> Tensor:
        A, B = (layer.get_parameter(f"default.{prefix}lora_{name}") for name in "AB")
        return F.linear(h, layer.weight, layer.bias) + scaling * h @ A.T @ B.T

    h = branch(torch.tanh(branch(x, "call_1_", model.layer)), "call_2_", model.layer)
    assert torch.allclose(model(x), branch(h, "", model.last), atol=1e-6)


@pytest.mark.parametrize("case", [pytest.param(CASES[0], marks=pytest.mark.long), *CASES[1:]], ids=str)
def test_all_laws_hold(case):
    found = verify(case.build(), config(case, lora_dropout=0.2), case.inputs, progress=False, quiet=True)
    assert [verdict.law for verdict in found.verdicts if verdict.outcome == "fails"] == [], found


@each_case
def test_it_is_saved_and_loaded(case, tmp_path):
    model = adapted(case)
    laws.perturbed(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.build(), tmp_path)
    assert torch.equal(run(loaded, case), run(model, case))
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {key for label in case.calls for key in keys_of(label)}


def keys_of(label: str) -> list[str]:
    path, _, call = label.rpartition(".call_")
    module = "" if path == "w" else f"{path or label}."  # a parameter of the model itself
    return [f"base_model.model.{module}lora_{name}.weight" + (f".call_{call}" if path else "") for name in "AB"]


@each_case
def test_peft_fails_loudly_with_its_file(case, tmp_path):
    adapted(case).save_pretrained(tmp_path)
    assert json.loads(Path(tmp_path, "adapter_config.json").read_text())["peft_type"] == "GRAPHPEFT_LORA_PER_CALL"
    with pytest.raises(KeyError, match="GRAPHPEFT_LORA_PER_CALL"):
        peft.PeftModel.from_pretrained(case.make(), str(tmp_path))
    assert "PEFT has no such method" in Path(tmp_path, "README.md").read_text()


def test_a_model_that_is_no_flat_graph_is_refused_with_the_way_out(tmp_path):
    case = CASES[1]
    adapted(case).save_pretrained(tmp_path)
    report = explain(Shared(), config(case))
    assert {refusal.reason for refusal in report.refused} == {
        "its calls can't be told apart: only a flat graph of the whole model tells the calls of a module apart"
    }
    assert all("get_peft_model(trace(model, example_inputs), config)" in refusal.way_out for refusal in report.refused)
    with pytest.raises(AdaptError, match="only a flat graph of the whole model"):
        PeftModel.from_pretrained(Shared(), tmp_path)


def test_operations_of_the_model_itself_are_told_apart_without_a_trace():
    case = CASES[3]
    torch.manual_seed(0)
    made = case.make()
    torch.manual_seed(2)
    model: Any = get_peft_model(made, config(case))
    laws.perturbed(model)
    traced_one = adapted(case)
    laws.perturbed(traced_one)
    assert [site.site.label for site in model.adapter_report().adapted] == list(case.calls)
    assert torch.allclose(run(model, case), run(traced_one, case), atol=1e-6)


def test_calls_inside_of_what_stays_a_call_are_refused():
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else self.layer(self.layer(x))

    shared = Deciding()
    model = trace(nn.Sequential(shared, shared), X)
    report = explain(model, LoraPerCallConfig(target_modules=["layer"]))
    assert [refusal.reason for refusal in report.refused] == [
        "its calls can't be told apart: 0.layer stays a call in the graph, which has no place for what differs inside"
    ]


@each_case
def test_merging_is_refused_by_name(case):
    model = adapted(case)
    laws.perturbed(model)
    before = run(model, case)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdaptError, match=r"call_1 of adapter 'default' can't be merged: it is (one of|the call)"):
            merge()
    assert torch.equal(run(model, case), before)
    model.unload()
    assert torch.equal(run(model, case), run(case.build(), case))


def test_where_every_weight_is_used_once_it_is_merged():
    case = CASES[1]._replace(targets=("last",))
    model = adapted(case)
    laws.perturbed(model)
    expected = run(model, case)
    assert torch.allclose(run(model.merge_and_unload(), case), expected, atol=1e-6)


@each_case
def test_a_pattern_names_one_call_or_all(case):
    first = case.calls[0]
    name = case.targets[0]
    found = adapted(case, rank_pattern={name: 3, f"{name}.call_1": 5}, alpha_pattern={f"{name}.call_2": 7})
    ranks = [site.specs["lora_A"].shape[0] for site in found.adapter_report().adapted]
    assert ranks[:2] == [5, 3]
    scales = [site.constants["lora_scaling"] for site in found.adapter_report().adapted]
    assert scales[:2] == [3 / 5, 7 / 3]
    assert first.endswith("call_1")


@each_case
def test_adapters_are_switched_disabled_deleted_and_unloaded(case):
    model = adapted(case)
    base = run(case.build(), case)
    laws.perturbed(model)
    first = run(model, case)
    model.add_adapter("shared", LoraConfig(r=3, target_modules=list(case.targets), init_lora_weights=False))
    model.set_adapter("shared")
    second = run(model, case)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(run(model, case), base)
    model.set_adapter(["default", "shared"])
    assert not torch.allclose(run(model, case), second)
    model.set_adapter("default")
    assert torch.equal(run(model, case), first)
    with pytest.warns(UserWarning, match="'shared' is active now"):
        model.delete_adapter("default")
    assert [name for name, _ in model.named_parameters() if "call_" in name] == []
    assert torch.equal(run(model, case), second)
    assert torch.equal(run(model.unload(), case), base)


@each_case
def test_rows_of_a_batch_have_different_adapters(case):
    model = adapted(case, init_lora_weights=False)
    options: dict[str, Any] = {"target_modules": list(case.targets), "init_lora_weights": False}
    model.add_adapter("calls", LoraPerCallConfig(r=3, **options))
    model.add_adapter("shared", LoraConfig(r=4, **options))
    names = ["shared", "default", "__base__", "calls"]
    found = run(model, case, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = run(model, case)
        else:
            model.set_adapter(name)
            expected = run(model, case)
        assert torch.allclose(found[row], expected[row], atol=1e-5), name


@each_case
def test_copies_and_pickles_hold_it(case):
    model = adapted(case)
    laws.perturbed(model)
    expected = run(model, case)
    assert torch.equal(run(copy.deepcopy(model), case), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), case), expected)


@each_case
def test_another_file_takes_its_place(case, tmp_path):
    model = adapted(case)
    laws.perturbed(model)
    model.save_pretrained(tmp_path)
    for rank in (2, 3):
        other = adapted(case, r=rank)
        hotswap_adapter(other, tmp_path, "default")
        assert torch.equal(run(other, case), run(model, case))


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda", "lora_ga", "eva", "loftq"])
def test_first_values_that_are_for_the_weight_as_a_whole_are_refused(kind):
    options = {"loftq_config": {"loftq_bits": 4}} if kind == "loftq" else {}
    report = explain(CASES[2].build(), config(CASES[2], init_lora_weights=kind, **options))
    assert {refusal.reason for refusal in report.refused} == {
        f"init_lora_weights={kind!r} is for a weight as a whole, and it is one of its calls"
    }


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "orthogonal"}])
def test_variants_act_at_each_call(options):
    case = CASES[2]
    model = adapted(case, **options)
    assert torch.allclose(run(model, case), run(case.build(), case), atol=1e-6)
    laws.perturbed(model)
    run(model, case).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in factors(model).values())
    assert len({name for name in factors(model) if "call_2_" in name}) == len(factors(model)) / 2


def test_parts_of_a_projection_are_adapted_at_each_call():
    case = CASES[2]
    model = adapted(case, target_parts={"0": [[0, 2], [4, 6]]})
    laws.perturbed(model)
    assert [site.site.label for site in model.adapter_report().adapted] == ["0.call_1", "0.call_2"]
    assert get_peft_model_state_dict(model)["base_model.model.0.lora_B.weight.call_2"].shape == (6, 4)


def test_some_calls_alone_have_no_name():
    case = CASES[2]
    with pytest.raises(AdaptError, match="no config names some calls of 0 alone"):
        get_peft_model(case.build(), config(case), where=lambda site: site.call.number == 1)


def test_they_are_not_combined():
    model = adapted(CASES[2])
    model.add_adapter("other", config(CASES[2]))
    with pytest.raises(AdaptError, match="adapters of calls can't be combined yet"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")


def test_a_bias_is_trained_once_for_all_calls(tmp_path):
    case = CASES[1]
    model = adapted(case, bias="lora_only")
    laws.perturbed(model)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in saved if name.endswith("bias")] == [
        "base_model.model.last.base_layer.bias",
        "base_model.model.layer.base_layer.bias",
    ]
    assert torch.equal(run(PeftModel.from_pretrained(case.build(), tmp_path), case), run(model, case))
