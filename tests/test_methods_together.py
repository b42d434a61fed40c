"""Adapters of several methods on one model: what each of them is alone, it is beside others, in every way they go."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import FIRST
from models import LLAMA
from torch import Tensor, nn

from graphpeft import (
    AdaptError,
    CartridgeConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begins}") for begins in ("fan_in_fan_out is set", "adapters are merged")
]

NAMES = ("default", "second", "third")
PROMPTS: dict[str, PeftConfig] = {
    "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "encoder": PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, encoder_hidden_size=8),
}
CONTRACTS = {str(contract): contract for contract in FIRST}
METHODS = [*CONTRACTS, *PROMPTS]


def of(count: int, seed: int, number: int) -> list[Any]:
    """Returns generated groups of methods, each method in some of them."""
    chosen = random.Random(seed)
    groups: set[tuple[str, ...]] = set()
    while len(groups) < number:
        order = chosen.sample(METHODS, len(METHODS))
        groups |= {tuple(group) for group in itertools.zip_longest(*[iter(order)] * count) if None not in group}
    return [pytest.param(group, id="-".join(group)) for group in sorted(groups)[:number]]


class Together:
    """A Llama with an adapter of each of some methods, in evaluation, with values that differ from the first ones.

    Args:
        methods: The methods.

    Attributes:
        model: The model.
        names: The adapters' names.
        alone: What each computes alone, and the base, as ``"__base__"``.
    """

    def __init__(self, methods: tuple[str, ...]) -> None:
        self.methods, self.names = methods, NAMES[: len(methods)]
        self.alone = {"__base__": logits(LLAMA.build())}
        self.model: Any = LLAMA.build()
        for number, (name, method) in enumerate(zip(self.names, methods, strict=True)):
            torch.manual_seed(number)
            config = PROMPTS[method] if method in PROMPTS else CONTRACTS[method].our_config()
            if number:
                self.model.add_adapter(name, copy.deepcopy(config))
            else:
                self.model = get_peft_model(self.model, copy.deepcopy(config))
            self.model.set_adapter(name)
            moved(self.model, number)
            self.alone[name] = logits(self.model)
            assert not torch.allclose(self.alone[name], self.alone["__base__"], atol=1e-4)

    def activated(self) -> bool:
        """Activates all; returns False if they can't act together, where the model stays as it is."""
        self.model.set_adapter("default")
        try:
            self.model.set_adapter([*self.names])
        except AdaptError:
            assert torch.equal(logits(self.model), self.alone["default"])
            return False
        return True


def moved(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    model.eval()


def logits(model: nn.Module, ids: Tensor | None = None, **options: Any) -> Tensor:
    given = torch.randint(3, 20, (4, 5), generator=torch.Generator().manual_seed(0)) if ids is None else ids
    with torch.no_grad():
        # a prompt has positions in front
        return model(input_ids=given, **options).logits[:, -given.shape[1] :]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def assert_each_is_what_it_was(together: Together, model: Any) -> None:
    for name in together.names:
        model.set_adapter(name)
        assert torch.equal(logits(model), together.alone[name]), name
    with model.disable_adapter():
        assert torch.equal(logits(model), together.alone["__base__"])


@pytest.mark.parametrize("methods", [*of(2, 0, 60), *of(3, 1, 30)])
def test_they_act_together_and_each_stays_what_it_is(methods: tuple[str, ...], tmp_path: Path) -> None:
    together = Together(methods)
    model = together.model
    assert_each_is_what_it_was(together, model)
    active = logits(model) if together.activated() else None
    with model.disable_adapter():
        assert torch.equal(logits(model), together.alone["__base__"])
    assert_each_is_what_it_was(together, model)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
    for name in together.names[1:]:
        again.load_adapter(tmp_path / name, name)
    assert_each_is_what_it_was(together, again.eval())
    if active is not None:
        for each in (model, again):
            each.set_adapter([*together.names])
            assert torch.equal(logits(each), active)
    for gone, left in itertools.pairwise(together.names):
        again.set_adapter(left)
        again.delete_adapter(gone)
        assert torch.equal(logits(again), together.alone[left])
    assert torch.equal(logits(again.unload()), together.alone["__base__"])


@pytest.mark.parametrize("methods", [*of(2, 2, 60), *of(3, 3, 30)])
def test_merged_they_are_what_they_are_active(methods: tuple[str, ...]) -> None:
    together = Together(methods)
    model = together.model
    if not together.activated():
        return
    active = logits(model)
    try:
        model.merge_adapter()
    except AdaptError:
        assert torch.equal(logits(model), active)
    else:
        assert_close(logits(model), active)
        model.unmerge_adapter()
        assert torch.equal(logits(model), active)
    assert_each_is_what_it_was(together, model)
    model.set_adapter([*together.names])
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except AdaptError:
        return
    assert_close(logits(merged), active)


@pytest.mark.parametrize("methods", [*of(2, 4, 60), *of(3, 5, 30)])
def test_rows_of_a_batch_have_those_of_different_methods(methods: tuple[str, ...]) -> None:
    together = Together(methods)
    rows = [*together.names, "__base__", "default"][-4:]
    if any(method in PROMPTS or "rows" in CONTRACTS[method].refuses for method in methods):
        with pytest.raises(AdaptError, match=r"one of several in a batch|depends on all rows"):
            logits(together.model, adapter_names=rows)
        assert_each_is_what_it_was(together, together.model)
        return
    found = logits(together.model, adapter_names=rows)
    for row, name in enumerate(rows):
        assert_close(found[row], together.alone[name][row])


@pytest.mark.parametrize("methods", [*of(2, 6, 40), *of(3, 7, 20)])
def test_all_that_act_are_trained(methods: tuple[str, ...]) -> None:
    together = Together(methods)
    if not together.activated():
        return
    model = together.model.train()
    torch.manual_seed(0)
    ids = torch.randint(3, 20, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    for name in together.names:
        own = [p for path, p in model.named_parameters() if p.requires_grad and f".{name}." in f".{path}."]
        assert own
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in own), name


PREFIXES: dict[str, PeftConfig] = {
    "short": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
    "cartridge": CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
}


@pytest.mark.parametrize("last", [*PROMPTS, *PREFIXES])
@pytest.mark.parametrize("first", ["prefix", "cartridge"])
def test_nothing_comes_behind_a_prefix_that_reads_the_cache_which_it_has_filled(first: str, last: str) -> None:
    configs = PROMPTS | PREFIXES
    model: Any = get_peft_model(LLAMA.build(), copy.deepcopy(configs[first]))
    model.add_adapter("second", copy.deepcopy(configs[last]))
    expected = logits(model)
    with pytest.raises(AdaptError, match=r"'second' can't act behind 'default', which changes .*; name 'default' last"):
        model.set_adapter(["default", "second"])
    assert torch.equal(logits(model), expected)
    if last not in ("prompt", "encoder"):
        return
    model.set_adapter(["second", "default"])
    moved(model, 0)
    active = logits(model)
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.allclose(logits(model), active, atol=1e-4)
