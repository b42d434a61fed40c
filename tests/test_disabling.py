"""While adapters are disabled, the model computes what its base does, and afterwards what its adapters make of it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import itertools
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, get_peft_model

pytestmark = pytest.mark.quick("adapters")

X = torch.arange(18.0).view(3, 6) / 10


def base() -> nn.Module:
    """Returns a model that is always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def adapted() -> Any:
    """Returns it with two adapters, of which the first acts."""
    model = graphpeft.get_peft_model(base(), graphpeft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), "a")
    model.add_adapter("b", graphpeft.LoraConfig(r=3, lora_alpha=2, target_modules=["0", "2"], bias="lora_only"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_a", "_b")):
                parameter += torch.randn(parameter.shape)
    return model


BASE = base()(X).detach()


def with_adapter(name: str) -> Tensor:
    """Returns what the model computes with one adapter."""
    model = adapted()
    model.set_adapter(name)
    return model(X).detach()


def assert_is(model: nn.Module, expected: Tensor) -> None:
    """Asserts what a model computes, bit for bit."""
    with torch.no_grad():
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_adapters_act_again_after_the_last_of_overlapping_contexts(order: tuple[int, ...]) -> None:
    model = adapted()
    contexts = [model.disable_adapter() for _ in order]
    for context in contexts:
        context.__enter__()
    for number in order:
        assert_is(model, BASE)
        contexts[number].__exit__(None, None, None)
    assert_is(model, with_adapter("a"))


def test_adapters_act_again_after_contexts_of_two_threads_that_overlap() -> None:
    model = adapted()
    entered, left = threading.Barrier(2), threading.Event()
    found: list[Tensor] = []

    def first() -> None:
        with model.disable_adapter():
            entered.wait()
        left.set()

    def second() -> None:
        with model.disable_adapter():
            entered.wait()
            left.wait()
            found.append(model(X).detach())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], BASE)
    assert_is(model, with_adapter("a"))


def test_many_threads_enter_and_leave_at_once() -> None:
    model = adapted()
    wrong: list[Tensor] = []

    def run() -> None:
        for _ in range(20):
            with model.disable_adapter(), torch.no_grad():
                found = model(X)
            if not torch.equal(found, BASE):
                wrong.append(found)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_is(model, with_adapter("a"))


def test_adapters_act_again_after_contexts_of_tasks_that_overlap() -> None:
    model = adapted()

    async def handle(naps: int) -> Tensor:
        with model.disable_adapter():
            for _ in range(naps):
                await asyncio.sleep(0)
            return model(X).detach()

    async def serve() -> list[Tensor]:
        return await asyncio.gather(*(handle(naps) for naps in (3, 1, 2)))

    assert all(torch.equal(found, BASE) for found in asyncio.run(serve()))
    assert_is(model, with_adapter("a"))


def test_adapters_act_again_after_a_context_that_ends_with_an_error() -> None:
    model = adapted()
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert_is(model, with_adapter("a"))


def test_a_context_can_be_entered_again() -> None:
    model = adapted()
    off = model.disable_adapter()
    for _ in range(2):
        with off:
            assert_is(model, BASE)
        assert_is(model, with_adapter("a"))


def test_adapters_enabled_within_a_context_act_after_it() -> None:
    model = adapted()
    model.disable_adapters()
    with model.disable_adapter():
        model.enable_adapters()
        assert_is(model, BASE)
    assert_is(model, with_adapter("a"))


def test_adapters_disabled_within_a_context_stay_so_after_it() -> None:
    model = adapted()
    with model.disable_adapter():
        model.disable_adapters()
    assert_is(model, BASE)
    model.enable_adapters()
    assert_is(model, with_adapter("a"))


@pytest.mark.parametrize("off", ["disable_adapter", "disable_adapters"])
def test_a_disabled_model_is_not_merged_into(off: str) -> None:
    model = adapted()
    with getattr(model, off)() or contextlib.nullcontext():
        with pytest.raises(graphpeft.AdaptError, match=r"disabled, and merged ones would act; leave disable_adapter"):
            model.merge_adapter()
        assert model.merged_adapters == []
        assert_is(model, BASE)
    model.enable_adapters()
    assert_is(model, with_adapter("a"))


def test_what_is_merged_is_unmerged_where_adapters_are_disabled() -> None:
    model = adapted()
    model.merge_adapter()
    with model.disable_adapter():
        assert_is(model, BASE)
        assert model.merged_adapters == []
        with pytest.warns(UserWarning, match="no adapter is merged"):
            model.unmerge_adapter()
        assert_is(model, BASE)
    assert_is(model, with_adapter("a"))


def test_adapters_set_and_deleted_within_a_context_act_or_not_after_it() -> None:
    model = adapted()
    with model.disable_adapter():
        model.set_adapter("b")
        assert_is(model, BASE)
        model.delete_adapter("a")
        assert_is(model, BASE)
        model.add_adapter("c", graphpeft.LoraConfig(r=1, target_modules=["2"]))
        graphpeft.get_peft_model(model, graphpeft.LoraConfig(r=1, target_modules=["2"]), "d")
        assert_is(model, BASE)
        model.set_adapter("b")
    assert_is(model, with_adapter("b"))


def test_a_model_unloaded_within_a_context_stays_unloaded() -> None:
    model = adapted()
    with model.disable_adapter():
        model.unload()
        assert_is(model, BASE)
    assert type(model) is nn.Sequential
    assert_is(model, BASE)


def test_adapters_of_a_model_adapted_anew_within_a_context_act_at_once() -> None:
    model = adapted()
    with model.disable_adapter():
        model.unload()
        other = adapted()
        graphpeft.get_peft_model(model, other.peft_config["a"], "a")
        model.load_state_dict(other.state_dict(), strict=False)
        assert_is(model, with_adapter("a"))
    assert_is(model, with_adapter("a"))


def test_a_model_merged_for_good_within_a_context_stays_merged() -> None:
    model = adapted()
    with model.disable_adapter():
        model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(X), with_adapter("a"))


def test_rows_have_the_base_where_adapters_are_disabled() -> None:
    model = adapted()
    names = ["a", "b", "__base__"]
    mixed = model(X, adapter_names=names).detach()
    assert not torch.equal(mixed[:2], BASE[:2])
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(X, adapter_names=names), BASE)
    with model.mixed_batch(names), torch.no_grad():
        assert torch.equal(model(X), mixed)
        with model.disable_adapter():
            assert torch.equal(model(X), BASE)
        assert torch.equal(model(X), mixed)


def test_rows_of_an_adapter_that_cannot_be_mixed_have_the_base_where_it_is_disabled() -> None:
    config = graphpeft.PromptTuningConfig(num_virtual_tokens=2, token_dim=6, prompt_scope="0")
    model: Any = graphpeft.get_peft_model(base(), config)
    with pytest.raises(AdaptError, match="can't be one of several in a batch"):
        model(X[None], adapter_names=["default"])
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(X[None], adapter_names=["default"])[0], BASE)


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_a_context_is_disabled_until_it_is_enabled(copying: Any) -> None:
    model = adapted()
    with model.disable_adapter():
        copied = copying(model)
    assert_is(model, with_adapter("a"))
    assert_is(copied, BASE)
    copied.set_adapter("b")
    assert_is(copied, BASE)
    copied.enable_adapters()
    assert_is(copied, with_adapter("b"))


# forwards that are set on modules later


CHANGES = ["disable", "set_adapter", "merge_adapter", "merge_and_unload", "unload", "rows"]


@pytest.mark.parametrize("change", CHANGES)
def test_no_adapter_changes_behind_a_forward_that_somebody_has_set(change: str):
    model, x, expected, expected_base = with_two_adapters()
    module = model.linear
    module.forward = functools.partial(lambda forward, *args: forward(*args), module.forward)
    changes: dict[str, Any] = {
        "disable": lambda: model.disable_adapter().__enter__(),
        "set_adapter": lambda: model.set_adapter([]),
        "rows": lambda: model(x, adapter_names=["default", "other", "__base__"]),
    }
    with pytest.raises(AdaptError, match="a forward was set on linear itself"):
        changes.get(change, lambda: getattr(model, change)())()
    assert torch.equal(model(x), expected)
    assert model.merged_adapters == []
    del module.forward
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected_base)


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_change_under_a_forward_that_somebody_has_set_on_the_model(change: str):
    model, x, _, _ = with_two_adapters()
    changes: dict[str, Any] = {
        "disable": lambda: (model.disable_adapter().__enter__(), model(x))[1],
        "set_adapter": lambda: (model.set_adapter("other"), model(x))[1],
        "rows": lambda: model(x, adapter_names=["default", "other", "__base__"]),
    }
    changed = changes.get(change, lambda: (getattr(model, change)(), model(x))[1])
    copied = copy.deepcopy(model)
    expected = changed()
    model = copied
    model.forward = functools.partial(lambda forward, *args: forward(*args) + 1, model.forward)
    torch.testing.assert_close(changed(), expected + 1)


@pytest.mark.parametrize("path", ["", "linear"])
@pytest.mark.parametrize("change", CHANGES)
def test_adapters_change_under_a_hook_of_accelerate_and_remain_when_that_goes(path: str, change: str):
    model, x, expected, expected_base = with_two_adapters()
    changes: dict[str, Any] = {
        "disable": lambda: (model.disable_adapter().__enter__(), model(x))[1],
        "set_adapter": lambda: (model.set_adapter("other"), model(x))[1],
        "rows": lambda: model(x, adapter_names=["default", "other", "__base__"]),
    }
    changed = changes.get(change, lambda: (getattr(model, change)(), model(x))[1])
    copied = copy.deepcopy(model)
    add_hook_to_module(model.get_submodule(path), ModelHook())
    assert torch.equal(model(x), expected)
    found = changed()
    remove_hook_from_module(model, recurse=True)
    hooked, model = model, copied
    torch.testing.assert_close(found, changed())
    if change != "rows":
        torch.testing.assert_close(hooked(x), found)
    if change == "unload":
        assert torch.equal(found, expected_base)


def with_two_adapters() -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a model with two adapters, an input, and what it gives for that with the first one and without any."""
    model: Any = Read()
    x = torch.randn(3, 4)
    options: dict[str, Any] = {"target_modules": ["linear", "w"], "init_lora_weights": False}
    for rank, name in ((2, "default"), (3, "other")):
        get_peft_model(model, LoraConfig(r=rank, lora_alpha=5, **options), name)
    model.set_adapter("default")
    with model.disable_adapter():
        expected_base = model(x)
    return model, x, model(x), expected_base


class Read(nn.Module):
    """Has a layer, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.linear(x), self.w)


def test_names_of_rows_are_checked_while_adapters_are_disabled_too():
    model = adapted()
    with model.disable_adapter(), pytest.raises(AdaptError, match="Adapter x does not exist"):
        model(X, adapter_names=["a", "x", "b"])
