"""Several adapters on one model: combined, merged, mixed in a batch, swapped, and quick to load; PEFT is the oracle."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from models import LLAMA, MLP, output
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, TaskType, get_peft_model_state_dict

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
    """Tells whether two tensors are equal within a part of the largest value."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def fill(library: Any, model: Any, name: str, seed: int | None = None) -> None:
    """Gives an adapter values that depend on its name alone."""
    state = library.get_peft_model_state_dict(model, adapter_name=name)
    generator = torch.Generator().manual_seed(ord(name) if seed is None else seed)
    values = {key: torch.randn(state[key].shape, generator=generator) * 0.3 for key in sorted(state)}
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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["u", "x"], [1, 1], "new"), "has no adapter 'x'; it has \\['u', 'v', 'w', 'z'\\]"),
        ((["u", "v"], [1], "new"), "2 adapters were named, with 1 weights"),
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
    with pytest.raises(AdaptError, match=r"'u' and 'v' both train head\.weight whole"):
        model.add_weighted_adapter(["u", "v"], [1, 1], "new")
    assert_unchanged(model, before)
    model.add_weighted_adapter(["u", "w"], [1, 0], "new", "linear")
    acting = output(model, MLP.inputs())
    model.set_adapter("new")
    torch.testing.assert_close(output(model, MLP.inputs()), acting)
