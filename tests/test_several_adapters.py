"""Several adapters on one model: combined, merged, mixed in a batch, swapped, and quick to load; PEFT is the oracle."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from models import CLASSIFIER, GPT2, LLAMA, MLP, T5, Experts, equal, llama_config, output
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphpeft
from graphpeft import AdaptError, TaskType, get_peft_model, get_peft_model_state_dict, own_weight
from graphpeft.adapters import mixing

LIBRARIES = (peft, graphpeft)


class Layers(nn.Module):
    """A layer of each kind that both libraries adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4 * 6 * 6)
        self.wide = nn.Conv2d(4, 6, 3, padding=1)
        self.narrow = nn.Conv2d(6, 4, 1)
        self.linear = nn.Linear(36, 10)
        self.other = nn.Linear(10, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Looks up images, and works on them."""
        x = self.table(tokens).reshape(-1, 4, 6, 6)
        return self.other(self.linear(self.narrow(self.wide(x)).flatten(2)))


TOKENS = torch.tensor([0, 3, 5, 11])


def with_adapters(library: Any, base: nn.Module, *options: dict[str, Any], names: str = "uvwzstkm") -> Any:
    """Returns a copy of `base` with one adapter for each of `options`, whose values are equal in both libraries."""
    model: Any = copy.deepcopy(base).eval()
    for index, (name, given) in enumerate(zip(names, options, strict=False)):
        config = library.LoraConfig(**given)
        if index == 0:
            model = library.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
        fill(library, model, name)
    return model.eval()


def near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Returns whether two tensors are equal within a part of the largest value."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def fill(library: Any, model: Any, name: str, seed: int | None = None) -> None:
    """Gives an adapter values that depend on its name alone."""
    state = library.get_peft_model_state_dict(model, adapter_name=name)
    generator = torch.Generator().manual_seed(ord(name) if seed is None else seed)
    values = {key: torch.randn(state[key].shape, generator=generator) * 0.3 for key in sorted(state)}
    values = {key: value if state[key].is_floating_point() else state[key] for key, value in values.items()}
    library.set_peft_model_state_dict(model, values, adapter_name=name)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns all that an operation that fails must leave as it was."""
    return {
        "tensors": {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "adapters": list(getattr(model, "peft_config", ())),
        "active": list(getattr(model, "active_adapters", ())),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Raises if a model isn't what it was."""
    now = snapshot(model)
    for what in ("classes", "attributes", "adapters", "active"):
        assert now[what] == before[what]
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, (tensor, requires_grad) in now["tensors"].items():
        assert torch.equal(tensor, before["tensors"][name][0]), name
        assert requires_grad == before["tensors"][name][1], name


# combined


ALL_LAYERS = ["table", "wide", "narrow", "linear", "other"]

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd of another rank": {"svd_rank": 3, "svd_full_matrices": False},
    "svd that clamps": {"svd_clamp": 0.9},
    "ties": {"density": 0.5},
    "ties by frequency": {"density": 0.4, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.5},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6, "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.7},
    "magnitude_prune_svd": {"density": 0.7},
}


def combined(
    library: Any, base: nn.Module, *options: dict[str, Any], kind: str, weights: list[float], **how: Any
) -> Any:
    """Returns a model with the adapter "new", which combines one adapter for each of `options`."""
    model = with_adapters(library, base, *options)
    torch.manual_seed(5)
    names = list("uvwzstkm"[: len(options)])
    model.add_weighted_adapter(names, weights, "new", combination_type=kind.split()[0], **how)
    model.set_adapter("new")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_combined_adapters_are_those_of_peft(kind: str):
    base = Layers()
    options = [{"r": 4, "lora_alpha": 8, "target_modules": ALL_LAYERS}, {"r": 4, "target_modules": ALL_LAYERS}]
    theirs, ours = (
        combined(library, base, *options, kind=kind, weights=[0.7, -1.3], **KINDS[kind]) for library in LIBRARIES
    )
    assert near(output(ours, (TOKENS,)), output(theirs, (TOKENS,)), 1e-5)
    expected = peft.get_peft_model_state_dict(theirs, adapter_name="new")
    found = get_peft_model_state_dict(ours, adapter_name="new")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_random_elements_are_left_out_as_peft_does_whatever_the_first_values_were(init: bool | str):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "init_lora_weights": init}
    found = []
    for library in LIBRARIES:
        model = combined(library, MLP.build(), options, options, kind="dare_linear", weights=[0.7, 0.4], density=0.5)
        found.append(library.get_peft_model_state_dict(model, adapter_name="new"))
        assert model.peft_config["new"].init_lora_weights == init
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor)


@pytest.mark.filterwarnings("ignore:of adapters with use_dora=True, A and B are combined:UserWarning")
@pytest.mark.parametrize("first", [True, False], ids=["use_dora", "beside use_dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_combined_adapters_of_dora_are_those_of_peft(kind: str, first: bool):
    options = [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL_LAYERS, "use_dora": first},
        {"r": 4, "target_modules": ALL_LAYERS, "use_dora": True},
    ]
    base = Layers()
    theirs, ours = (
        combined(library, base, *options, kind=kind, weights=[0.7, -1.3], **KINDS[kind]) for library in LIBRARIES
    )
    assert near(output(ours, (TOKENS,)), output(theirs, (TOKENS,)), 1e-4)
    expected = peft.get_peft_model_state_dict(theirs, adapter_name="new")
    found = get_peft_model_state_dict(ours, adapter_name="new")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"combination_type": "svd", "svd_clamp": 0.9}, {"combination_type": "ties_svd"}])
def test_adapters_in_half_precision_are_combined(dtype: torch.dtype, options: dict[str, Any]):
    torch.manual_seed(0)
    found = []
    for each in (torch.float32, dtype):
        torch.manual_seed(1)
        model: Any = MLP.build().to(dtype).to(each)
        config = graphpeft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
        for name in "uv":
            model = graphpeft.get_peft_model(model, copy.deepcopy(config), name, autocast_adapter_dtype=False)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                parameter.copy_(parameter.to(dtype))
        model.add_weighted_adapter(["u", "v"], [0.5, 2.0], "new", density=0.5, **options)
        both = model.first.up.new
        found.append(both.lora_B.float() @ both.lora_A.float())
    torch.testing.assert_close(*found, atol=5e-2, rtol=5e-2)


def test_lengths_that_were_trained_are_not_combined_and_it_says_so():
    options = {"r": 2, "target_modules": ["up"], "use_dora": True}
    model = with_adapters(graphpeft, MLP.build(), options, options)
    untrained = own_weight(model.first.up).detach().norm(dim=1)
    model.merge_adapter(["u"])  # whose lengths a new adapter must not see
    with torch.no_grad():
        model.first.up.v.lora_magnitude *= 3
    with pytest.warns(UserWarning, match="A and B are combined, and not the lengths.*those of the weights"):
        model.add_weighted_adapter(["u", "v"], [0.5, 2.0], "new", "cat")
    torch.testing.assert_close(model.first.up.new.lora_magnitude.detach(), untrained)


def test_adapters_of_different_ranks_and_targets_are_put_together():
    base = LLAMA.build()
    options = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
        {"r": 3, "target_modules": ["v_proj", "up_proj"]},
    ]
    for kind in ("cat", "svd"):
        theirs, ours = (combined(library, base, *options, kind=kind, weights=[0.5, 0.8]) for library in LIBRARIES)
        torch.testing.assert_close(output(ours, LLAMA.inputs()), output(theirs, LLAMA.inputs()), rtol=1e-4, atol=1e-5)
        assert ours.peft_config["new"].r == theirs.peft_config["new"].r


def test_a_combined_adapter_is_saved_and_loaded_as_any_other(tmp_path: Any):
    options = {"r": 4, "target_modules": ["up_proj", "q_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}
    model = combined(graphpeft, LLAMA.build(), options, options, kind="cat", weights=[1.0, 1.0])
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "new")
    assert torch.equal(output(loaded, LLAMA.inputs()), output(model, LLAMA.inputs()))
    theirs = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "new"))
    torch.testing.assert_close(output(theirs, LLAMA.inputs()), output(model, LLAMA.inputs()))
    model.set_adapter(["u", "v"])
    torch.testing.assert_close(output(loaded, LLAMA.inputs()), output(model, LLAMA.inputs()))


class Grouped(nn.Module):
    """Convolutions that PEFT can't combine: with groups, transposed, and in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.transposed = nn.ConvTranspose1d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Goes through both."""
        return self.transposed(torch.tanh(self.grouped(x)))


def test_the_sum_of_adapters_of_grouped_and_transposed_convolutions_is_exact():
    base, x = Grouped(), (torch.randn(2, 4, 9),)
    options = [
        {"r": 2, "target_modules": ["grouped", "transposed"]},
        {"r": 4, "target_modules": ["grouped", "transposed"]},
    ]
    model = combined(graphpeft, base, *options, kind="cat", weights=[1.0, 1.0])
    summed = output(model, x)
    model.set_adapter(["u", "v"])
    torch.testing.assert_close(summed, output(model, x))
    with pytest.raises(AdaptError, match=r"can't combine 'u', 'v': the change of grouped can't be decomposed.*groups"):
        model.add_weighted_adapter(["u", "v"], [1.0, 1.0], "third")
    only = [{"r": 2, "target_modules": ["transposed"]}, {"r": 3, "target_modules": ["transposed"]}]
    model = combined(graphpeft, base, *only, kind="svd", weights=[1.0, 1.0], svd_rank=5)
    summed = output(model, x)
    model.set_adapter(["u", "v"])
    torch.testing.assert_close(summed, output(model, x), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_at_a_grouped_convolution_is_filled_up_in_each_group():
    x = (torch.randn(2, 4, 9),)
    targets: dict[str, Any] = {"target_modules": ["grouped", "transposed"]}
    options = [{"r": 2, **targets}, {"r": 4, "rank_pattern": {"grouped": 2}, **targets}]
    model = combined(graphpeft, Grouped(), *options, kind="cat", weights=[1.0, 1.0])
    assert model.get_parameter("grouped.new.lora_A").shape[0] == 6
    summed = output(model, x)
    model.set_adapter(["u", "v"])
    torch.testing.assert_close(summed, output(model, x))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["u", "x"], [1, 1], "new"), "Adapter x does not exist; the model has \\['u', 'v', 'w', 'z'\\]"),
        ((["u", "v"], [1], "new"), "2 adapters named, with 1 weight;"),
        (([], [], "new"), "no adapters to combine"),
        ((["u", "u"], [1, 1], "new"), "named twice"),
        ((["u", "v"], [1, 1], "u"), "has an adapter 'u' already"),
        ((["u", "v"], [1, 1], "new", "sum"), "combination_type is 'sum'; choose one of"),
        ((["u", "v"], [1, 1], "new", "ties"), "a share of the elements, the density"),
        ((["u", "w"], [1, 1], "new", "linear"), "adds up factors of equal ranks.*choose 'cat'"),
        ((["u", "z"], [1, 1], "new"), "of several methods, LORA and PROMPT_TUNING"),
        ((["z"], [1], "new"), "PROMPT_TUNING has no way to combine"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(arguments: tuple[Any, ...], reason: str):
    lora = [{"r": rank, "target_modules": ["q_proj"]} for rank in (2, 2, 3)]
    model = with_adapters(graphpeft, LLAMA.build(), *lora)
    model.add_adapter("z", graphpeft.PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    before = snapshot(model)
    with pytest.raises(AdaptError, match=reason):
        model.add_weighted_adapter(*arguments)
    assert_unchanged(model, before)


def test_copies_of_modules_that_two_adapters_train_whole_are_not_combined():
    options = {"r": 2, "target_modules": ["up"], "modules_to_save": ["head"]}
    model = with_adapters(graphpeft, MLP.build(), options, options, {"r": 2, "target_modules": ["up"]})
    before = snapshot(model)
    with pytest.raises(AdaptError, match=r"'u' and 'v' both fully train head\.weight"):
        model.add_weighted_adapter(["u", "v"], [1, 1], "new")
    assert_unchanged(model, before)
    model.add_weighted_adapter(["u", "w"], [1, 0], "new", "linear")
    acting = output(model, MLP.inputs())
    model.set_adapter("new")
    torch.testing.assert_close(output(model, MLP.inputs()), acting)


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_changes_of_a_stack_of_experts_are_combined_expert_by_expert(kind: str):
    torch.manual_seed(0)
    base, x = Experts(), (torch.randn(2, 3, 6),)
    options = [{"r": 3, "lora_alpha": 5, "target_parameters": ["up"]}, {"r": 3, "target_parameters": ["up"]}]
    model = combined(graphpeft, base, *options, kind=kind, weights=[1.0, 1.0], svd_rank=5 if kind == "svd" else None)
    found = output(model, x)
    model.set_adapter(["u", "v"])
    if kind != "linear":
        torch.testing.assert_close(found, output(model, x), rtol=1e-4, atol=1e-5)
        return
    A, B = (sum_of_roots(model, name) for name in ("up_lora_A", "up_lora_B"))
    torch.testing.assert_close(model.get_parameter("new.up_lora_A"), A)
    torch.testing.assert_close(model.get_parameter("new.up_lora_B"), B)


def sum_of_roots(model: Any, tensor: str) -> Tensor:
    scales = {"u": 5 / 3, "v": 8 / 3}
    return sum(
        (model.get_parameter(f"{name}.{tensor}") * scale**0.5 for name, scale in scales.items()), torch.zeros(())
    )


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_trained_rows_are_combined_by_the_weighted_sum_of_their_changes(kind: str, tmp_path: Any):
    untouched = Layers()
    options = [
        {"r": 2, "target_modules": ["linear"], "trainable_token_indices": {"table": rows}} for rows in ([1, 3], [3, 4])
    ]
    model = with_adapters(graphpeft, untouched, *options)
    base = untouched.table.weight.detach()
    with torch.no_grad():
        model.table.token_adapter.trainable_tokens_delta["u"].copy_(base[[1, 3]] + torch.tensor([[1.0], [2.0]]))
        model.table.token_adapter.trainable_tokens_delta["v"].copy_(base[[3, 4]] + torch.tensor([[4.0], [8.0]]))
    model.add_weighted_adapter(["u", "v"], [0.5, -2.0], "new", kind)
    changes = model.table.token_adapter.trainable_tokens_delta["new"] - base[[1, 3, 4]]
    expected = torch.tensor([[0.5], [0.5 * 2 - 2 * 4], [-2 * 8.0]])
    torch.testing.assert_close(changes, expected.expand_as(changes))
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = graphpeft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "new")
    torch.testing.assert_close(output(loaded, (TOKENS,)), output(model, (TOKENS,)))


@pytest.mark.parametrize("saved", [(["lm_head"], ["model.norm"]), (None, ["model.norm"])], ids=str)
def test_what_any_of_the_combined_adapters_trains_fully_is_in_their_combination(saved: tuple[Any, Any]):
    options = [{"r": 2, "target_modules": ["q_proj"], "modules_to_save": names} for names in saved]
    model = with_adapters(graphpeft, LLAMA.build(), *options)
    model.add_weighted_adapter(["u", "v"], [1.0, 1.0], "new", "cat")
    model.set_adapter(["u", "v"])
    both = output(model, LLAMA.inputs())
    model.set_adapter("new")
    torch.testing.assert_close(output(model, LLAMA.inputs()), both)


# mixed in a batch


ROWS = ["u", "__base__", "v", "w", "u"]


def mixed_llama(library: Any, **options: Any) -> Any:
    """Returns a Llama with three adapters of different ranks, scales and targets."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(**options)).eval()
    adapters: list[dict[str, Any]] = [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
        {"r": 4, "target_modules": ["v_proj"]},
    ]
    return with_adapters(library, model, *adapters)


ONE_LAYER = {"num_hidden_layers": 1}
"""Of a Llama that is compiled again and again: each of its layers takes seconds."""


def text(rows: int = 5) -> dict[str, Any]:
    """Returns tokens, with a mask of ones."""
    ids = torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_row(model: Any, inputs: dict[str, Any] | tuple[Any, ...], names: list[str]) -> Tensor:
    """Returns what each row gives by itself, with its own adapter alone."""
    rows = []
    for index, name in enumerate(names):
        own = slice(index, index + 1)
        given = {k: v[own] for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(v[own] for v in inputs)
        model.set_adapter([] if name == "__base__" else name)
        rows.append(output(model, given))
    return torch.cat(rows)


def test_a_mixed_batch_is_that_of_peft():
    theirs, ours = (mixed_llama(library) for library in LIBRARIES)
    with torch.no_grad():
        expected = theirs(**text(), adapter_names=ROWS).logits
        before = output(ours, text())
        assert equal(ours(**text(), adapter_names=ROWS).logits, expected)
    assert torch.equal(output(ours, text()), before)
    assert equal(by_row(ours, text(), ROWS), expected)


@pytest.mark.parametrize("names", [["__base__"] * 3, ["v", "__base__", "v"], ["v"] * 3, ["u"] * 3], ids=" ".join)
def test_an_active_adapter_that_no_row_has_does_not_act(names: list[str]):
    base, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(3, 8)
    options: list[dict[str, Any]] = [{"r": 2, "target_modules": [layer]} for layer in ("0", "2")]
    theirs, ours = (with_adapters(library, base, *options) for library in LIBRARIES)
    for active in ("u", "v", "u"):
        for model in (theirs, ours):
            model.set_adapter(active)
        with torch.no_grad():
            assert equal(ours(x, adapter_names=names), theirs(x, adapter_names=names))


def test_an_active_prompt_that_no_row_has_does_not_act():
    model = with_adapters(graphpeft, LLAMA.build(), {"r": 2, "target_modules": ["q_proj"]})
    names = ["u", "__base__", "u"]
    with torch.no_grad():
        expected = model(**text(3), adapter_names=names).logits
        prompt = graphpeft.PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
        model.add_adapter("p", prompt)
        model.set_adapter("p")
        assert output(model, text(3)).shape[1] > expected.shape[1]
        assert equal(model(**text(3), adapter_names=names).logits, expected)


def test_rows_of_the_base_alone_are_counted() -> None:
    config = graphpeft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    x = torch.ones(4, 4)
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x, adapter_names=["__base__"] * 4), expected)
    with pytest.raises(ValueError, match=r"names 3 rows, and the model is given tensors of the shapes \[\(4, 4\)\]"):
        model(x, adapter_names=["__base__"] * 3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_text_is_generated_for_a_mixed_batch_as_in_peft(options: dict[str, int]):
    theirs, ours = (mixed_llama(library) for library in LIBRARIES)
    options |= {"max_new_tokens": 4, "min_new_tokens": 4}
    expected = theirs.generate(**text(), adapter_names=ROWS, **options)
    assert torch.equal(ours.generate(**text(), adapter_names=ROWS, **options), expected)
    with pytest.raises(ValueError, match="names 4 rows"):
        ours.generate(**text(), adapter_names=ROWS[:4], max_new_tokens=2)
    assert torch.equal(ours.generate(**text(), max_new_tokens=4), ours.generate(**text(), max_new_tokens=4))


def test_an_encoder_has_the_rows_once_when_its_decoder_has_them_for_each_beam():
    options: list[dict[str, Any]] = [{"r": 2, "target_modules": ["q", "wo"]}, {"r": 3, "target_modules": ["v"]}]
    theirs, ours = (with_adapters(library, T5.build(), *options) for library in LIBRARIES)
    inputs = {"input_ids": text(3)["input_ids"], "max_new_tokens": 4, "num_beams": 2}
    names = ["u", "v", "__base__"]
    assert torch.equal(ours.generate(**inputs, adapter_names=names), theirs.generate(**inputs, adapter_names=names))


@pytest.mark.parametrize("is_flat", [False, True], ids=["in place", "flat graph"])
def test_layers_that_see_all_tokens_as_rows_have_those_of_the_batch(is_flat: bool):
    # the Conv1D of GPT-2 reads its input as (rows · tokens, features)
    own: dict[str, Any] = {"fan_in_fan_out": True}
    options = [own | {"r": 2, "target_modules": ["c_attn", "c_fc"]}, own | {"r": 3, "target_modules": ["c_fc"]}]
    base, inputs = GPT2.build(), text(3) | {"use_cache": False}
    names = ["u", "v", "__base__"]
    theirs = with_adapters(peft, base, *options)
    ours = with_adapters(graphpeft, graphpeft.trace(base, inputs) if is_flat else base, *options)
    with torch.no_grad():
        expected = theirs(**inputs, adapter_names=names).logits
        assert near(ours(**inputs, adapter_names=names)["logits"], expected, 1e-5)


def test_convolutions_and_embeddings_are_mixed_as_in_peft():
    options = [
        {"r": 4, "target_modules": ALL_LAYERS},
        {"r": 2, "lora_alpha": 7, "target_modules": ["wide", "linear"]},
        {"r": 4, "target_modules": ["table"]},
    ]
    base = Layers()
    theirs, ours = (with_adapters(library, base, *options) for library in LIBRARIES)
    rows = torch.tensor([1, 2, 3, 4, 5])
    with torch.no_grad():
        expected = theirs(rows, adapter_names=ROWS)
        assert near(ours(rows, adapter_names=ROWS), expected, 1e-6)


class Functions(nn.Module):
    """A weight in a linear operation, one that is stored the other way, and one that no operation describes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 8))
        self.down = nn.Parameter(torch.randn(8, 8))
        self.gate = nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Uses each."""
        return self.inner(torch.tanh(nn.functional.linear(x, self.up) @ self.down)) * torch.softmax(self.gate, 0)[0]


@pytest.mark.parametrize("targets", [["up", "down", "inner"], ["up", "down", "gate"], ["gate", "inner"]], ids=" ".join)
@pytest.mark.parametrize("is_flat", [False, True], ids=["in place", "flat graph"])
@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
def test_weights_that_no_layer_holds_are_mixed(targets: list[str], is_flat: bool, shape: tuple[int, ...]):
    x = torch.randn(shape)
    base = graphpeft.trace(Functions(), (x,)) if is_flat else Functions()
    options: list[dict[str, Any]] = [{"r": rank, "target_modules": targets} for rank in (2, 3, 1)]
    model = with_adapters(graphpeft, base, *options)
    with torch.no_grad():
        found = model(x, adapter_names=ROWS)
    assert equal(found, by_row(model, (x,), ROWS))


def test_a_mixed_batch_is_trained_as_its_rows_are():
    model = mixed_llama(graphpeft)
    model.set_adapter(["u", "v", "w"])
    model.train()
    model(**text(), adapter_names=ROWS).logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found
    model.zero_grad()
    alone = copy.deepcopy(model)
    loss = torch.zeros(())
    for index, name in enumerate(ROWS):
        alone.set_adapter([] if name == "__base__" else name)
        alone.requires_grad_(True)
        loss = loss + alone(**{k: v[index : index + 1] for k, v in text().items()}).logits.square().sum()
    (loss / (5 * 7 * 64)).backward()
    expected = dict(alone.named_parameters())
    for name, gradient in found.items():
        assert gradient is not None
        assert near(gradient, expected[name].grad, 1e-5), name  # type: ignore[arg-type]


def test_rows_drop_elements_with_the_probability_of_their_adapter():
    base = nn.Sequential(nn.Linear(64, 64))
    options: list[dict[str, Any]] = [{"r": 8, "target_modules": ["0"], "lora_dropout": p} for p in (0.0, 0.5)]
    model, x = with_adapters(graphpeft, base, *options), torch.randn(2, 64)
    with torch.no_grad():
        still = model(x, adapter_names=["u", "v"])
        model.train()
        runs = [model(x, adapter_names=["u", "v"]) for _ in range(2)]
    assert equal(runs[0][0], still[0])
    assert equal(runs[1][0], still[0])
    assert not torch.equal(runs[0][1], runs[1][1])


def test_what_a_row_does_not_drop_is_scaled_up_by_its_own_probability():
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    options: list[dict[str, Any]] = [
        {"r": 8, "lora_alpha": 8, "target_modules": ["0"], "lora_dropout": p} for p in (0.0, 0.5, 0.75)
    ]
    model = with_adapters(graphpeft, base, *options).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.eye(8))
        added = (model(x, adapter_names=["u", "v", "w"]) - base(x)) / x
    for row, times in zip(added, (1.0, 2.0, 4.0), strict=True):
        assert ((row.abs() < 1e-4) | ((row - times).abs() < 1e-4)).all()
    assert (added[0].abs() > 0.5).all()


def test_a_row_whose_adapter_has_the_scale_zero_is_that_of_the_base():
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    options: list[dict[str, Any]] = [{"r": 2, "lora_alpha": alpha, "target_modules": ["0"]} for alpha in (0, 8)]
    model = with_adapters(graphpeft, base, *options)
    rows = model(x, adapter_names=["u", "v"])
    assert equal(rows[0], base(x)[0])
    assert not equal(rows[1], base(x)[1])


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("given", [False, True], ids=["no states given", "states given"])
def test_rows_of_recurrent_layers_have_their_own_states(cls: Any, given: bool):
    base, x = cls(6, 5, num_layers=2, batch_first=True).eval(), torch.randn(4, 3, 6)
    model = with_adapters(graphpeft, nn.ModuleDict({"l": base}), *[{"r": 2, "target_modules": ["l"]}] * 2)
    states = torch.randn(2, 4, 5)
    more = () if not given else ((states, states),) if cls is nn.LSTM else (states,)
    each = []
    for name in ("u", "v"):
        model.set_adapter(name)
        each.append(tree_leaves(model["l"](x, *more)))
    with model.mixed_batch(["u", "u", "v", "v"]):
        rows = tree_leaves(model["l"](x, *more))
    for found, of_u, of_v, dim in zip(rows, *each, (0, 1, 1), strict=False):
        torch.testing.assert_close(found, torch.cat([of_u.narrow(dim, 0, 2), of_v.narrow(dim, 2, 2)], dim))


def test_a_table_with_as_many_entries_as_there_are_rows_is_not_taken_for_rows():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x, positions):
            return (x + positions) @ self.w

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.positions = Mixer(), nn.Parameter(torch.randn(9, 8))

        def forward(self, x):
            return self.mixer(x, self.positions[: x.shape[1]])

    model = with_adapters(graphpeft, Positioned(), *[{"r": 2, "target_modules": ["mixer.w"], "use_dora": True}] * 2)
    with pytest.raises(ValueError, match="of which it isn't known which are rows of the batch"):
        model(torch.randn(3, 3, 8), adapter_names=["u", "v", "__base__"])


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_model_in_double_precision_have_exact_scales(default: torch.dtype):
    options: list[dict[str, Any]] = [{"r": rank, "lora_alpha": 1, "target_modules": ["0"]} for rank in (3, 7)]
    model = with_adapters(graphpeft, nn.Sequential(nn.Linear(8, 8)), *options).double()
    x, names = torch.randn(3, 8).double(), ["u", "v", "u"]
    expected = by_row(model, (x,), names)
    torch.set_default_dtype(default)
    try:
        found = model(x, adapter_names=names)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-14)


def test_rows_in_half_precision_have_scales_of_their_own():
    options: list[dict[str, Any]] = [{"r": 2, "lora_alpha": alpha, "target_modules": ["0"]} for alpha in (8, 3)]
    model = with_adapters(graphpeft, nn.Sequential(nn.Linear(8, 8)), *options).bfloat16()
    x, names = torch.randn(3, 8).bfloat16(), ["u", "v", "u"]
    with torch.no_grad():
        found = model(x, adapter_names=names)
    assert found.dtype == torch.bfloat16
    assert near(found, by_row(model, (x,), names), 1e-2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_runs_again_with_the_rows_of_its_first_run(use_reentrant: bool):
    def gradients(checkpoints: bool) -> dict[str, Tensor]:
        model = mixed_llama(graphpeft)
        model.set_adapter(["u", "v", "w"])
        model.train()
        if checkpoints:
            # of this name before Transformers 5.24, where it is deprecated
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        first = model(**text(), adapter_names=ROWS, use_cache=False).logits.square().mean()
        # other rows come, and none, before the backward
        second = model(**text(), adapter_names=ROWS[::-1], use_cache=False).logits.square().mean()
        third = model(**text(), use_cache=False).logits.square().mean()
        (first + 2 * second + third).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert near(found[name], gradient, 1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_are_mixed_in_other_types(dtype: torch.dtype):
    options: list[dict[str, Any]] = [{"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["up_proj"]}]
    theirs, ours = (with_adapters(library, LLAMA.build().to(dtype), *options) for library in LIBRARIES)
    names = ["u", "v", "__base__", "u", "v"]
    with torch.no_grad():
        expected, found = (model(**text(), adapter_names=names).logits for model in (theirs, ours))
    assert found.dtype == expected.dtype == dtype
    assert near(found, expected, 1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_rows_are_forgotten_after_a_call_that_fails():
    model = mixed_llama(graphpeft)
    before = output(model, text())
    said = r"adapter_names names 3 rows, and model\.layers\.0\.\S+ is given a tensor of the shape \(5, 7, 32\)"
    with pytest.raises(ValueError, match=said):
        model(**text(), adapter_names=["u", "v", "w"])
    assert torch.equal(output(model, text()), before)
    with pytest.raises(ZeroDivisionError), model.mixed_batch(ROWS):
        raise ZeroDivisionError
    assert torch.equal(output(model, text()), before)


def test_rows_of_one_thread_are_not_those_of_another():
    model = mixed_llama(graphpeft)
    plain = output(model, text())
    found: list[Tensor] = []
    with model.mixed_batch(ROWS):
        other = threading.Thread(target=lambda: found.append(output(model, text())))
        other.start()
        other.join()
    assert torch.equal(found[0], plain)


def test_rows_of_one_task_are_not_those_of_another():
    model = mixed_llama(graphpeft)
    names = [["u"] * 5, ["v"] * 5, ["w"] * 5, ["__base__"] * 5, ROWS]
    with torch.no_grad():
        expected = [model(**text(), adapter_names=of_row).logits for of_row in names]
        active = output(model, text())

        async def answer(of_row: list[str] | None) -> Tensor:
            with model.mixed_batch(of_row) if of_row is not None else contextlib.nullcontext():
                await asyncio.sleep(0)
                first = model(**text()).logits
                await asyncio.sleep(0)
                assert torch.equal(model(**text()).logits, first)
                return first

        async def answers() -> list[Tensor]:
            return await asyncio.gather(*(answer(of_row) for of_row in (*names, None)))

        for found, wanted in zip(asyncio.run(answers()), (*expected, active), strict=True):
            assert equal(found, wanted)


def test_rows_of_a_task_are_those_of_the_context_around_after_one_inside_was_left():
    model = mixed_llama(graphpeft)
    with torch.no_grad():
        expected = model(**text(), adapter_names=ROWS).logits

        async def answer() -> Tensor:
            with model.mixed_batch(ROWS):
                with model.mixed_batch(ROWS[::-1]):
                    model(**text())
                return model(**text()).logits

        assert torch.equal(asyncio.run(answer()), expected)


def test_a_compiled_model_never_answers_a_task_with_rows_of_another():
    model, plain = (mixed_llama(graphpeft, **ONE_LAYER) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    names = [["u"] * 5, ["v"] * 5, ROWS]
    with torch.no_grad():
        expected = [plain(**text(), adapter_names=of_row).logits for of_row in names]

        async def answer(of_row: list[str]) -> Tensor:
            await asyncio.sleep(0)
            alone = compiled(**text(), adapter_names=of_row).logits
            with model.mixed_batch(of_row):
                await asyncio.sleep(0)
                assert near(compiled(**text()).logits, alone, 1e-6)
            return alone

        async def answers() -> list[Tensor]:
            return await asyncio.gather(*(answer(of_row) for of_row in names))

        for found, wanted in zip(asyncio.run(answers()), expected, strict=True):
            assert near(found, wanted, 1e-6)


@pytest.mark.parametrize("is_compiled_before", [False, True])
def test_a_whole_compiled_graph_refuses_rows_of_tasks(is_compiled_before: bool):
    model = mixed_llama(graphpeft, **ONE_LAYER)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    if is_compiled_before:
        with torch.no_grad():
            model(**text(), adapter_names=ROWS)
        whole(**text())

    async def ask() -> None:
        with model.mixed_batch(ROWS), pytest.raises(Exception, match="pass adapter_names to the"):
            whole(**text())

    asyncio.run(ask())
    with torch.no_grad(), model.mixed_batch(ROWS):
        found = whole(**text()).logits
    with torch.no_grad():
        assert near(found, model(**text(), adapter_names=ROWS).logits, 1e-6)


def test_a_compiled_model_has_the_rows_of_the_context_around_after_one_inside_was_left():
    model = with_adapters(
        graphpeft, nn.Sequential(nn.Linear(4, 3)), *[{"r": r, "target_modules": ["0"]} for r in (2, 3)]
    )
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x, adapter_names=["v", "__base__"])
        with model.mixed_batch(["v", "__base__"]):
            with model.mixed_batch(["u", "v"]):
                compiled(x)
            assert near(compiled(x), expected, 1e-6)


def test_a_whole_compiled_graph_refuses_rows_of_tasks_as_long_as_one_has_any():
    model = with_adapters(graphpeft, nn.Sequential(nn.Linear(4, 3)), {"r": 2, "target_modules": ["0"]})
    whole, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 4)

    async def leave() -> None:
        with model.mixed_batch(["u", "__base__"]):
            pass

    async def answer() -> None:
        with model.mixed_batch(["__base__", "u"]):
            await asyncio.create_task(leave())
            with pytest.raises(Exception, match="can't tell the rows of one asyncio task from those of another"):
                whole(x)

    asyncio.run(answer())


@pytest.mark.parametrize("compiles", [False, True])
def test_rows_of_a_batch_dont_go_on_with_adapters_that_were_merged_or_deleted(compiles: bool):
    model = mixed_llama(graphpeft, **ONE_LAYER if compiles else {})
    called = torch.compile(model, backend="eager") if compiles else model
    with torch.no_grad(), model.mixed_batch(ROWS):
        before = called(**text()).logits
        model.merge_adapter(["v"])
        with pytest.raises(Exception, match="given adapters by row, v were merged into the weights"):
            called(**text())
        model.unmerge_adapter()
        assert near(called(**text()).logits, before, 1e-6)
        model.delete_adapter("w")
        with pytest.raises(Exception, match="given adapters by row, w were deleted"):
            called(**text())
    with torch.no_grad():
        called(**text(), adapter_names=["u", "v", "u", "v", "__base__"])


def test_rows_follow_adapters_that_come_go_and_are_edited():
    model = mixed_llama(graphpeft)
    with torch.no_grad():
        first = model(**text(), adapter_names=ROWS).logits
        model.set_adapter(["v", "w"])
        assert equal(model(**text(), adapter_names=ROWS).logits, first)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert equal(copied(**text(), adapter_names=ROWS).logits, first)
        fill(graphpeft, model, "u", seed=3)
        assert not equal(model(**text(), adapter_names=ROWS).logits, first)
        assert equal(model(**text(), adapter_names=ROWS).logits, by_row(model, text(), ROWS))
        model.delete_adapter("w")
        model.add_adapter("w", graphpeft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        assert equal(model(**text(), adapter_names=ROWS).logits, by_row(model, text(), ROWS))
        with model.disable_adapter():
            assert equal(model(**text(), adapter_names=ROWS).logits, output(LLAMA.build(), text()))
    model.set_adapter("u")
    model.unload()
    assert {type(module) for module in model.modules()} == {type(module) for module in LLAMA.build().modules()}


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("path", ["0", "0.0"])
def test_rows_follow_a_module_that_its_copy_has_replaced(path: str, compiles: bool):
    base = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 4))
    model = with_adapters(graphpeft, base, *[{"r": rank, "target_modules": ["0.0"]} for rank in (2, 3)])
    called = torch.compile(model, backend="eager") if compiles else model
    x, names = torch.randn(2, 6), ["u", "__base__"]
    with torch.no_grad():
        before = called(x, adapter_names=names)
        model.set_submodule(path, copy.deepcopy(model.get_submodule(path)))
        assert near(called(x, adapter_names=names), before, 1e-6)


def test_a_mixture_is_remembered_by_the_adapters_that_act_when_it_is_made(monkeypatch: pytest.MonkeyPatch):
    base = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(2, 6)
    expected = base(x)
    model = with_adapters(graphpeft, base, {"r": 2, "target_modules": ["0"]})
    make, rows = mixing._made_runners, ["__base__"] * 2

    def made_after_a_switch(*arguments: Any) -> Any:
        thread = threading.Thread(target=model.set_adapter, args=([],))
        thread.start()
        thread.join()
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "_made_runners", made_after_a_switch)
        model(x, adapter_names=rows)
    model.set_adapter("u")
    assert near(model(x, adapter_names=rows), expected, 1e-6)


def test_rows_have_the_targets_of_an_adapter_that_was_deleted_and_came_again():
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model = with_adapters(graphpeft, base, *[{"r": rank, "target_modules": ["0"]} for rank in (4, 2, 2)])
    x, batches = torch.randn(2, 6), [["v", "__base__"], ["__base__", "w"]]
    with torch.no_grad():
        model(x, adapter_names=["v", "w"])
        model.delete_adapter("v")
        model.add_adapter("v", graphpeft.LoraConfig(r=3, target_modules=["2"], init_lora_weights=False))
        found = [model(x, adapter_names=names) for names in batches]
    for names, result in zip(batches, found, strict=True):
        assert equal(result, by_row(model, (x,), names))


def test_rows_follow_a_graph_that_was_edited():
    options: list[dict[str, Any]] = [{"r": rank, "target_modules": ["0"]} for rank in (2, 3)]
    model = with_adapters(graphpeft, nn.Sequential(nn.Linear(4, 3)), *options)
    x = torch.randn(2, 4)
    with torch.no_grad():
        before = model(x, adapter_names=["u", "v"])
        graph = model[0].graph
        result = next(node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(result):
            result.args = (graph.call_function(torch.neg, result.args),)
        model[0].recompile()
        assert torch.equal(model(x, adapter_names=["u", "v"]), -before)


def test_rows_that_run_in_turn_have_the_adapter_of_a_model_inside():
    inner = with_adapters(graphpeft, nn.Sequential(nn.Linear(4, 3)), {"r": 2, "target_modules": ["0"]}, names="i")
    options: list[dict[str, Any]] = [{"r": 2, "target_modules": ["0.0"], "init_lora_weights": "olora"}]
    options += [{"r": 3, "target_modules": ["0.0"]}]
    model = with_adapters(graphpeft, nn.Sequential(inner), *options)
    x, names = torch.randn(3, 4), ["v", "__base__", "u"]
    expected = by_row(model, (x,), names)
    with torch.no_grad():
        assert equal(model(x, adapter_names=names), expected)
        assert equal(expected[1:2], inner(x[1:2]))


WITH_TENSORS_OF_THEIR_OWN: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "up_proj", "model.norm"]},
    {"target_modules": ["q_proj", "up_proj"], "trainable_token_indices": [3, 7, 20]},
    {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"},
    {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {"target_modules": ["q_proj"], "bias": "all"},
]


@pytest.mark.parametrize("active", ["u", "v", "w"])
@pytest.mark.parametrize(
    "own", WITH_TENSORS_OF_THEIR_OWN, ids=lambda own: list(own)[1] + "-" + str(list(own.values())[1])
)
def test_rows_have_the_tensors_that_override_the_models_own(own: dict[str, Any], active: str):
    plain, other = {"r": 4, "target_modules": ["q_proj", "up_proj", "lm_head"]}, own | {"r": 2}
    base = transformers.LlamaForCausalLM(llama_config(attention_bias=True, mlp_bias=True)).eval()
    model = with_adapters(graphpeft, base, plain, other, other)
    expected = by_row(model, text(), ROWS)
    model.set_adapter(active)
    alone = output(model, text())
    assert near(model(**text(), adapter_names=ROWS).logits, expected, 1e-5)
    assert torch.equal(output(model, text()), alone)
    model.set_adapter("w")
    model(**text(), adapter_names=["w", "w", "u", "w", "__base__"]).logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("weight_w" in name or "trainable_tokens_delta.w" in name or "lora_" in name for name in found)
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_heads_of_their_own_are_mixed_as_in_peft():
    head = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    names = ["u", "v", "__base__", "v", "u"]
    theirs, ours = (with_adapters(library, LLAMA.build(), head, head) for library in LIBRARIES)
    with torch.no_grad():
        expected, found = (model(**text(), adapter_names=names).logits for model in (theirs, ours))
    assert near(found, expected, 1e-6)


class Shifted(nn.Linear):
    """A layer with a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias) + self.shift


def test_rows_have_the_buffers_of_their_adapters_copies():
    model: Any = nn.Sequential(nn.Linear(4, 4), Shifted())
    config = graphpeft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    for name in "uv":
        model = graphpeft.get_peft_model(model, copy.deepcopy(config), name)
    names, x, rows = ["v", "u", "__base__", "v"], torch.randn(4, 4), {}
    with torch.no_grad():
        for name, shift in (("u", 1.0), ("v", -2.0)):
            model.set_adapter(name)
            model[1].shift.fill_(shift)
            rows[name] = model(x)
        with model.disable_adapter():
            rows["__base__"] = model(x)
        expected = torch.stack([rows[name][number] for number, name in enumerate(names)])
        torch.testing.assert_close(model(x, adapter_names=names), expected)


def test_what_is_read_elsewhere_cannot_differ_from_row_to_row():
    head = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = with_adapters(graphpeft, graphpeft.trace(LLAMA.build(), text() | {"use_cache": False}), head, head)
    with pytest.raises(AdaptError, match=r"those of lm_head, .*that is called by itself: the model reads its tensors"):
        model(**text(), use_cache=False, adapter_names=ROWS[:1] * 5)


class Entered(nn.Linear):
    """A layer that has another way in than its forward."""

    def without_bias(self, x: Tensor) -> Tensor:
        """Multiplies by the weight alone."""
        return x @ self.weight.T


def with_head(forward: Any, head: nn.Module) -> nn.Module:
    """Returns a model with this forward, a projection and this head."""
    model = type("Made", (nn.Module,), {"forward": forward})()
    model.q_proj, model.head = nn.Linear(8, 8), head
    return model


def subtracts_bias(self: Any, x: Tensor) -> Tensor:
    return self.head(self.q_proj(x)) - self.head.bias


def enters_otherwise(self: Any, x: Tensor) -> Tensor:
    return self.head.without_bias(self.q_proj(x))


def enters_untraced(self: Any, x: Tensor) -> Tensor:
    head = self.head
    return head.without_bias(x) if x.sum() > 0 else self.head(self.q_proj(x))


def calls(self: Any, x: Tensor) -> Tensor:
    return self.head(self.q_proj(x))


@pytest.mark.parametrize(
    ("forward", "head", "options", "reason"),
    [
        (subtracts_bias, nn.Linear(8, 8), {"modules_to_save": ["head"]}, "reads bias of head in a batch whose rows"),
        (subtracts_bias, nn.Linear(8, 8), {"bias": "all"}, "reads bias of head in a batch whose rows"),
        (enters_otherwise, Entered(8, 8), {"modules_to_save": ["head"]}, "reads weight of head in a batch whose rows"),
        (enters_untraced, Entered(8, 8), {"modules_to_save": ["head"]}, "reads weight of head in a batch whose rows"),
        (calls, nn.BatchNorm1d(8), {"modules_to_save": ["head"]}, "those of head, .*its forward can't become a graph"),
        (calls, nn.MultiheadAttention(8, 2), {"modules_to_save": ["head"]}, "those of head, .*it has no weight"),
    ],
)
def test_tensors_that_are_not_read_by_their_layer_alone_cannot_differ_from_row_to_row(
    forward: Any, head: nn.Module, options: dict[str, Any], reason: str
):
    given = {"r": 2, "target_modules": ["q_proj"]}
    model = with_adapters(graphpeft, with_head(forward, head), given, given | options)
    with pytest.raises(AdaptError, match=reason):
        model(torch.rand(2, 8), adapter_names=["u", "v"])


def test_methods_that_nobody_calls_keep_no_layer_from_differing_from_row_to_row():
    given = {"r": 2, "target_modules": ["q_proj"]}
    model = with_adapters(graphpeft, with_head(calls, Entered(8, 8)), given, given | {"modules_to_save": ["head"]})
    x, expected = torch.randn(2, 8), []
    for name in "uv":
        model.set_adapter(name)
        expected.append(model(x))
    found = model(x, adapter_names=["u", "v"])
    assert near(found, torch.stack([expected[0][0], expected[1][1]]), 1e-6)


def test_a_compiled_model_has_mixed_batches_in_one_graph():
    model = mixed_llama(graphpeft)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = compiled(**text(), use_cache=False).logits
        for names in (ROWS, ROWS[::-1]):
            expected = model(**text(), use_cache=False, adapter_names=names).logits
            with model.mixed_batch(names):
                assert equal(compiled(**text(), use_cache=False).logits, expected)
        assert torch.equal(compiled(**text(), use_cache=False).logits, plain)


def test_what_cannot_be_merged_can_be_mixed():
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).eval()
    options: dict[str, Any] = {"target_modules": ["0"], "init_lora_weights": False}
    graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, **options), "a")
    model.add_adapter("b", graphpeft.LoraConfig(r=4, **options))
    x = torch.randn(3, 4, 6, 6)
    found = model(x, adapter_names=["a", "b", "__base__"])
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        assert torch.allclose(found[row], model(x)[row], atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(found[2], model(x)[2], atol=1e-5)


def test_rows_without_a_rank_are_not_given_that_of_an_adapter_of_another_batch():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) @ self.w

    model: Any = Around().eval()
    get_peft_model(model, graphpeft.LoraConfig(r=3, target_modules=["block"]), "elsewhere")
    ada = graphpeft.AdaLoraConfig(total_step=9, target_modules=["block"], init_lora_weights=False)
    model.add_adapter("a", ada)
    model.add_adapter("h", graphpeft.HiraConfig(r=2, target_modules=["w"], init_weights=False))
    x = torch.randn(3, 8)
    found = model(x, adapter_names=["a", "h", "__base__"])
    for row, name in enumerate("ah"):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], model(x)[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "error", "reason"),
    [
        (["u", "x", "y"], AdaptError, r"Adapter x, y does not exist; the model has \['p', 'u'\], and '__base__'"),
        ("u", TypeError, r"is the text 'u'; pass a list of names"),
        ([], ValueError, "adapter_names is empty; name one adapter for each row"),
        (["u", "p"], AdaptError, "'p' changes what modules are given or return, not weights"),
    ],
)
def test_what_cannot_be_mixed_is_refused(names: Any, error: type[Exception], reason: str):
    model = with_adapters(graphpeft, LLAMA.build(), {"r": 2, "target_modules": ["q_proj"]})
    model.add_adapter("p", graphpeft.PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    before = snapshot(model)
    with pytest.raises(error, match=reason):
        model(**text(), adapter_names=names)
    assert_unchanged(model, before)
    with pytest.raises(error, match=reason):
        model.generate(**text(), adapter_names=names)


# merged in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_place_is_undone_bit_for_bit(dtype: torch.dtype):
    options: list[dict[str, Any]] = [{"r": rank, "target_modules": ["q_proj", "up_proj"]} for rank in (4, 2)]
    theirs, ours = (with_adapters(library, LLAMA.build().to(dtype), *options) for library in LIBRARIES)
    base = {name: weight.clone() for name, weight in LLAMA.build().to(dtype).named_parameters()}
    for model in (theirs, ours):
        model.set_adapter("u")
    adapted = output(ours, text())
    for model in (theirs, ours):
        model.merge_adapter()
    assert ours.merged_adapters == ["u"]
    assert not any(hasattr(type(module), "_graphpeft_template") for module in ours.modules())
    merged = output(ours, text())
    assert near(merged, adapted, 1e-5 if dtype is torch.float32 else 0.05)
    assert near(merged, output(theirs, text()), 1e-6 if dtype is torch.float32 else 0.02)
    ours.unmerge_adapter()
    assert torch.equal(output(ours, text()), adapted)
    assert all(torch.equal(ours.get_parameter(name), weight) for name, weight in base.items())


def test_adapters_that_are_not_merged_act_on_beside_those_that_are():
    options: list[dict[str, Any]] = [{"r": rank, "target_modules": ["q_proj", "up_proj"]} for rank in (4, 2)]
    model = with_adapters(graphpeft, LLAMA.build(), *options)
    model.set_adapter(["u", "v"])
    both = output(model, text())
    model.merge_adapter(["u"])
    assert near(output(model, text()), both, 1e-5)
    with pytest.warns(UserWarning, match="u are merged already; v are merged beside them"):
        model.merge_adapter()
    assert model.merged_adapters == ["u", "v"]
    assert near(output(model, text()), both, 1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do: u, v"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="u, v are merged, and are unmerged first"):
        model.set_adapter("u")
    assert model.merged_adapters == []
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()
    model.set_adapter(["u", "v"])
    assert torch.equal(output(model, text()), both)
    model.merge_adapter(["u"])
    model.delete_adapter("v")
    assert (model.active_adapters, model.merged_adapters) == (["u"], ["u"])
    merged = output(model, text())
    model.unmerge_adapter()
    assert near(merged, output(model, text()), 1e-5)
    assert not near(merged, both, 1e-5)


def test_what_is_merged_while_none_is_active_is_unmerged_by_a_switch_to_none():
    model = with_adapters(graphpeft, LLAMA.build(), {"r": 2, "target_modules": ["q_proj"]})
    model.set_adapter([])
    base = output(model, text())
    model.merge_adapter(["u"])
    assert not near(output(model, text()), base, 1e-5)
    with pytest.warns(UserWarning, match="u are merged, and are unmerged first"):
        model.set_adapter([])
    assert model.merged_adapters == []
    assert torch.equal(output(model, text()), base)


def test_one_that_is_merged_acts_before_one_that_cannot_be():
    model = with_adapters(graphpeft, LLAMA.build(), {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    model.add_adapter("lily", graphpeft.LilyConfig(r=2, init_weights=False, target_modules=["q_proj"]))
    model.set_adapter(["lily", "u"])
    both = output(model, text())
    with pytest.raises(
        AdaptError, match=r"by 'lily' depends on the weight itself.* name 'u' before 'lily' in set_adapter"
    ):
        model.merge_adapter(["u"])
    assert torch.equal(output(model, text()), both)
    model.set_adapter(["u", "lily"])
    both = output(model, text())
    model.merge_adapter(["u"])
    assert near(output(model, text()), both, 1e-5)


@pytest.mark.parametrize("names", [["w", "u"], ["u", "w"]])
def test_no_order_lets_one_be_merged_beside_one_that_reads_the_base(names: list[str]):
    model = with_adapters(graphpeft, LLAMA.build(), {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    model.add_adapter("w", graphpeft.HiraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    model.set_adapter(names)
    with pytest.raises(AdaptError, match="merge all that are active, or activate others"):
        model.merge_adapter(["u"])
    # the one that reads the base finds it as it is, and what is left reads no weight
    both = output(model, text())
    model.merge_adapter(["w"])
    assert near(output(model, text()), both, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, text()), both)


def test_adapters_are_merged_in_the_order_in_which_they_act():
    targets: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
    model = with_adapters(graphpeft, LLAMA.build(), {"r": 4} | targets, {"r": 2, "use_dora": True} | targets)
    model.set_adapter(["u", "v"])
    both = output(model, text())
    model.merge_adapter(["v", "u"])
    assert model.merged_adapters == ["u", "v"]
    assert near(output(model, text()), both, 1e-5)


def test_a_merged_model_is_disabled_unloaded_and_merged_for_good():
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    base = output(LLAMA.build(), text())
    model = with_adapters(graphpeft, LLAMA.build(), options)
    adapted = output(model, text())
    model.merge_adapter()
    with pytest.raises(AdaptError, match="'u' is merged into the weights; call unmerge_adapter"):
        model.delete_adapter("u")
    with pytest.raises(AdaptError, match=r"u are merged into the weights, which all rows share"):
        model(**text(), adapter_names=["u"] * 5)
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(output(model, text()), base)
    assert torch.equal(output(model, text()), adapted)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    assert torch.equal(output(model.unload(), text()), base)
    with pytest.warns(UserWarning, match="nothing to do: u"):
        assert near(output(copied.merge_and_unload(), text()), adapted, 1e-5)


def test_a_layer_tells_of_what_is_merged_there_alone():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for number in range(2):
        model = graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, target_modules=[str(number)]), f"at {number}")
    model.merge_adapter(["at 0", "at 1"])
    assert [layer.merged_adapters for layer in model.get_layer_status()] == [["at 0"], ["at 1"]]


def test_a_file_has_the_embeddings_of_the_base_where_they_are_merged_into():
    config = graphpeft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    model: Any = graphpeft.get_peft_model(LLAMA.build(), config)
    before = copy.deepcopy(graphpeft.get_peft_model_state_dict(model, save_embedding_layers=True))
    model.merge_adapter()
    after = graphpeft.get_peft_model_state_dict(model, save_embedding_layers=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_a_merge_that_fails_changes_nothing():
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = with_adapters(graphpeft, LLAMA.build(), options, options)
    model.merge_adapter(["u"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.v.lora_B[0, 0] = torch.inf
    before = snapshot(model)
    with (
        pytest.warns(UserWarning, match="u are merged already; v are merged beside them"),
        pytest.raises(AdaptError, match="with 'v' merged into it isn't finite"),
    ):
        model.merge_adapter(["v"], safe_merge=True)
    with pytest.raises(AdaptError, match="Adapter x does not exist"):
        model.merge_adapter(["v", "x"])
    with pytest.raises(TypeError, match=r"the text 'v'; pass a list of names, \['v'\]"):
        model.merge_adapter("v")
    assert_unchanged(model, before)
    assert model.merged_adapters == ["u"]


@pytest.mark.parametrize("around", ["itself", "a module around it", "a module inside"])
def test_weights_into_which_adapters_are_merged_are_not_loaded(around: str):
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = with_adapters(graphpeft, LLAMA.build(), options, options)
    loaded: torch.nn.Module = {
        "itself": model,
        "a module around it": torch.nn.ModuleDict({"inner": model}),
        "a module inside": model.model.layers[1].mlp,
    }[around]
    base = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    model.merge_adapter()
    merged = output(model, text())
    loaded.load_state_dict(loaded.state_dict())
    for holder in (loaded, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        with pytest.raises(AdaptError, match=r"up_proj.weight than the one|q_proj.weight than the one"):
            holder.load_state_dict(base)
    assert torch.equal(output(model, text()), merged)
    model.unmerge_adapter()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, base[name])
    loaded.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in base.items()})
    assert all(not tensor.any() for tensor in loaded.state_dict().values())


def test_a_merged_adapter_gets_no_other_values():
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = with_adapters(graphpeft, LLAMA.build(), options, options)
    values = graphpeft.get_peft_model_state_dict(model, adapter_name="v")
    model.merge_adapter(["u"])
    with pytest.raises(AdaptError, match=r"'u' is merged into the weights.*call unmerge_adapter"):
        graphpeft.set_peft_model_state_dict(model, values, "u")
    graphpeft.set_peft_model_state_dict(model, values, "v")


def test_what_is_merged_already_is_told_when_others_are_merged_for_good():
    options: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = with_adapters(graphpeft, LLAMA.build(), options, options)
    model.set_adapter(["u", "v"])
    both = output(model, text())
    model.set_adapter("u")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="u are merged already; v are merged beside them"):
        assert near(output(model.merge_and_unload(adapter_names=["v"]), text()), both, 1e-5)


def test_adapters_are_not_changed_while_their_modules_are_elsewhere():
    options: dict[str, Any] = {"target_modules": ["0", "2"], "init_lora_weights": False}
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
    x = torch.randn(2, 3)
    base = model(x)
    graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, **options))
    adapted = model(x)
    model.insert(0, torch.nn.Identity())
    for change in (model.unload, lambda: model.set_adapter([]), lambda: model.disable_adapter().__enter__()):
        with pytest.raises(AdaptError, match="'default' acts on 1, 3, which had another place in the model"):
            change()
        assert torch.equal(model(x), adapted)
    del model[0]
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(model.unload()(x), base)


@pytest.mark.parametrize("order", [(0, 1, 1, 2, 3), (0, 0, 1, 2, 3), (3, 3, 2, 1, 0)], ids=str)
def test_adapters_are_not_changed_while_layers_are_repeated_so_that_others_have_their_places(order: tuple[int, ...]):
    model: Any = nn.ModuleDict({"layers": nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))})
    graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=2, target_modules=r"layers\.\d", init_lora_weights=False))
    layers = model["layers"]
    model["layers"] = nn.Sequential(*(layers[index] for index in order))
    for change in (model.unload, lambda: model.set_adapter([]), lambda: model.disable_adapter().__enter__()):
        with pytest.raises(AdaptError, match=r"'default' acts on layers\.4, which had another place in the model"):
            change()
    model["layers"] = layers
    assert type(model.unload()["layers"][3]) is nn.Linear


# deleted, loaded


def test_the_first_that_is_left_acts_after_the_active_one_was_deleted_as_in_peft():
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    theirs, ours = (with_adapters(library, LLAMA.build(), options, options, options) for library in LIBRARIES)
    for model in (theirs, ours):
        model.set_adapter("v")
        with pytest.warns(UserWarning, match=r"v.* was active .* deleted"):
            model.delete_adapter("v")
    assert ours.active_adapters == theirs.active_adapters == ["u"]
    assert equal(output(ours, text()), by_row(ours, text(), ["u"] * 5))
    assert equal(output(ours, text()), output(theirs, text()))
    ours.delete_adapter("w")
    ours.delete_adapter("u")
    assert ours.active_adapters == []


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path):
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    model = with_adapters(graphpeft, LLAMA.build(), options, options)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "v" / "adapter_model.safetensors")
    saved.popitem()
    safetensors.torch.save_file(saved, tmp_path / "v" / "adapter_model.safetensors")
    before = snapshot(model)
    with pytest.raises(graphpeft.CheckpointError, match="lacks"):
        model.load_adapter(tmp_path / "v", "w")
    assert_unchanged(model, before)
    model.load_adapter(tmp_path / "u", "w")
    assert equal(by_row(model, text(), ["w"] * 5), by_row(model, text(), ["u"] * 5))


# swapped


def saved(folder: Path, seed: int, **options: Any) -> Path:
    """Saves an adapter for a Llama, and returns its folder."""
    model = get_peft_model(LLAMA.build(), graphpeft.LoraConfig(**options))
    fill(graphpeft, model, "default", seed)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_swapped_without_compiling_again(tmp_path: Path):
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    first, second = (saved(tmp_path / str(seed), seed, **options) for seed in (1, 2))
    model = graphpeft.PeftModel.from_pretrained(LLAMA.build(), first)
    compilations: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compilations.append(1)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)
    parameters = dict(model.named_parameters())
    for folder in (first, second):
        graphpeft.hotswap_adapter(compiled, folder, "default")
        expected = graphpeft.PeftModel.from_pretrained(LLAMA.build(), folder)
        assert equal(output(compiled, LLAMA.inputs()), output(expected, LLAMA.inputs()))
    assert sum(compilations) == 1
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_an_adapter_is_swapped_for_one_of_other_targets_and_ranks(tmp_path: Path):
    first = saved(tmp_path / "first", 1, r=2, target_modules=["q_proj", "v_proj"])
    second = saved(tmp_path / "second", 2, r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"])
    model = graphpeft.PeftModel.from_pretrained(LLAMA.build(), first)
    model.load_adapter(first, "other")
    theirs = peft.PeftModel.from_pretrained(LLAMA.build(), str(first))
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        peft_hotswap(theirs, str(second), "default", torch_device="cpu")
    graphpeft.hotswap_adapter(model, second, "default")
    assert list(model.peft_config) == ["default", "other"]
    assert model.active_adapters == ["default"]
    expected = graphpeft.PeftModel.from_pretrained(LLAMA.build(), second)
    assert torch.equal(output(model, LLAMA.inputs()), output(expected, LLAMA.inputs()))
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "again"))
    assert equal(output(again, LLAMA.inputs()), output(model, LLAMA.inputs()))


def test_a_swap_that_fails_changes_nothing(tmp_path: Path):
    first = saved(tmp_path / "first", 1, r=2, target_modules=["q_proj"])
    wider = saved(tmp_path / "wider", 1, r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = graphpeft.PeftModel.from_pretrained(LLAMA.build(), first)
    model.add_adapter("head", graphpeft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.set_adapter(["default", "head"])
    before, parameters = snapshot(model), dict(model.named_parameters())
    with pytest.raises(AdaptError, match="both fully train lm_head"):
        graphpeft.hotswap_adapter(model, wider, "default")
    with pytest.raises(AdaptError, match="Adapter x does not exist"):
        graphpeft.hotswap_adapter(model, first, "x")
    prompt = get_peft_model(
        LLAMA.build(), graphpeft.PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    )
    prompt.save_pretrained(tmp_path / "prompt")
    with pytest.raises(AdaptError, match="is a LORA adapter, and the saved one is of PROMPT_TUNING"):
        graphpeft.hotswap_adapter(model, tmp_path / "prompt", "default")
    assert_unchanged(model, before)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(AdaptError, match="'default' is merged into the weights; call unmerge_adapter"):
        graphpeft.hotswap_adapter(model, first, "default")


# with the base model that a config names


@pytest.mark.quick("auto")
def test_an_adapter_is_loaded_with_its_base_as_in_peft(tmp_path: Path):
    base: Any = LLAMA.build()
    base.save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    for task in (TaskType.CAUSAL_LM, None):
        config = graphpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type=task)
        model = get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / "adapter")
        name = "AutoPeftModel" if task is None else "AutoPeftModelForCausalLM"
        ours, theirs = (getattr(library, name).from_pretrained(tmp_path / "adapter") for library in (graphpeft, peft))
        assert isinstance(ours, transformers.LlamaForCausalLM)
        assert torch.equal(output(ours, LLAMA.inputs()), output(model.eval(), LLAMA.inputs()))
        assert equal(output(ours, LLAMA.inputs()), output(theirs, LLAMA.inputs()))
        if task is not None:
            with pytest.raises(AdaptError, match=r"task is CAUSAL_LM; load it by AutoPeftModelForCausalLM"):
                graphpeft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
        else:
            with pytest.raises(AdaptError, match=r"wants to import 'transformers.*import_allowlist"):
                graphpeft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=[])
    with pytest.raises(TypeError, match=r"call AutoPeftModel.from_pretrained"):
        graphpeft.AutoPeftModel()


def test_an_adapter_of_a_task_is_loaded_with_a_base_for_it(tmp_path: Path):
    base: Any = CLASSIFIER.build()
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = CLASSIFIER.config(task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "a")
    ours, theirs = (
        library.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a") for library in (graphpeft, peft)
    )
    assert {type(model.get_base_model()).__name__ for model in (ours, theirs)} == {type(base).__name__}
    assert equal(output(ours, CLASSIFIER.inputs()), output(theirs, CLASSIFIER.inputs()))


@pytest.mark.quick("auto")
def test_code_of_a_bases_repository_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tmp_path / "base"
    base.mkdir()
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (base / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto_map}))
    (base / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    config = graphpeft.LoraConfig(target_modules=["q"], task_type=TaskType.CAUSAL_LM)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # it isn't asked for
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    load = graphpeft.AutoPeftModelForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AttributeError):  # the code has no such classes
        load(tmp_path / "adapter", trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_adapters_of_one_layer_act_in_their_order_also_inside_of_a_module_that_has_a_graph() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.layer = nn.Parameter(torch.randn(6, 6) / 2), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(nn.functional.linear(x, self.w)))

    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 2, "lora_alpha": 5, "init_lora_weights": False}
    model: Any = get_peft_model(nn.Sequential(Around()), graphpeft.LoraConfig(target_modules=["w", "layer"], **options))
    model.add_adapter("second", graphpeft.LoraConfig(target_modules=["layer"], use_dora=True, **options))
    with torch.no_grad():
        model.get_parameter("0.layer.second.lora_magnitude").mul_(1.7)
    x = torch.randn(3, 6)
    for order in (["default", "second"], ["second", "default"]):
        model.set_adapter(order)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), model(x))


def test_choosing_an_adapter_freezes_one_that_was_loaded_to_be_trained(tmp_path: Path):
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 4)), graphpeft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == {
        f"0.{adapter}.lora_{factor}" for adapter in ("default", "loaded") for factor in "AB"
    }
    model.set_adapter("default")
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == {
        "0.default.lora_A",
        "0.default.lora_B",
    }


def test_the_first_by_name_acts_after_the_only_active_one_was_deleted():
    model: Any = get_peft_model(nn.Sequential(nn.Linear(6, 4)), graphpeft.LoraConfig(r=2, target_modules=["0"]))
    for name in ("second", "first"):
        model.add_adapter(name, graphpeft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(graphpeft.PeftWarning, match="'first' is active now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["first"]


@pytest.mark.parametrize("library", ["transformersx", "transformersx.models", "x.transformers"])
def test_a_library_whose_name_begins_like_an_allowed_one_is_not_imported(library: str, tmp_path: Path):
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), graphpeft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    auto_mapping = {"parent_library": library, "base_model_class": "Model"}
    edited = {"auto_mapping": auto_mapping, "base_model_name_or_path": "base"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **edited}))
    with pytest.raises(AdaptError, match=f"wants to import '{library}'"):
        graphpeft.AutoPeftModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"r": 4}, {"target_modules": ["2"]}, {"lora_alpha": 9}], ids=str
)
def test_a_mixture_with_a_deleted_adapter_is_forgotten_when_another_one_takes_its_name(options: dict[str, Any]):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    common = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    get_peft_model(model, graphpeft.LoraConfig(**common), "a")
    model.add_adapter("b", graphpeft.LoraConfig(**common))
    x = torch.randn(4, 4)
    model(x, adapter_names=["a", "b", "a", "b"])
    model.delete_adapter("b")
    model.add_adapter("b", graphpeft.LoraConfig(**{**common, **options}))
    expected = []
    for name in ("a", "b"):
        model.set_adapter(name)
        expected.append(model(x))
    found = model(x, adapter_names=["a", "b", "a", "b"])
    torch.testing.assert_close(found[0::2], expected[0][0::2])
    torch.testing.assert_close(found[1::2], expected[1][1::2])
