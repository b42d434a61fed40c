"""Checkpoints compute again with what held in their first run, and PyTorch is afterwards as it was."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpeft
from graphpeft import LoraConfig, get_peft_model
from graphpeft.graph.recomputing import taken_along

# a checkpoint inside of one with use_reentrant=True runs without gradients at first
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")

ROWS = ["u", "v", "__base__", "v"]


def of_pytorch() -> list[dict[str, Any]]:
    owners = (torch.utils.checkpoint, torch.utils.checkpoint.CheckpointFunction)
    return [{name: value for name, value in vars(owner).items() if not name.startswith("__")} for owner in owners]


BEFORE = of_pytorch()
BOTH_WAYS = pytest.mark.parametrize("use_reentrant", [False, True])


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def mixed(use_reentrant: bool | None) -> Any:
    """A model with a checkpoint inside of a checkpoint, and two adapters."""
    torch.manual_seed(0)
    inside = Checkpointed(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), use_reentrant)
    model = Checkpointed(nn.Sequential(nn.Linear(5, 6), inside, nn.GELU(), nn.Linear(6, 3)), use_reentrant)
    options: dict[str, Any] = {"target_modules": ["0", "3"], "init_lora_weights": False}
    adapted: Any = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **options), adapter_name="u")
    adapted.add_adapter("v", LoraConfig(r=3, lora_alpha=4, **options))
    adapted.set_adapter(["u", "v"])
    return adapted


def batch(seed: int = 1) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: nn.Module, expected: nn.Module) -> None:
    gradients_found, gradients_expected = gradients(found), gradients(expected)
    assert gradients_found.keys() == gradients_expected.keys()
    for name, gradient in gradients_expected.items():
        torch.testing.assert_close(gradients_found[name], gradient, msg=name)


@BOTH_WAYS
def test_pytorchs_checkpoints_are_the_same_after_a_mixed_batch(use_reentrant: bool):
    model = mixed(use_reentrant)
    model(batch(), adapter_names=ROWS).sum().backward()
    assert of_pytorch() == BEFORE


def test_pytorchs_checkpoints_are_the_same_after_a_mixed_batch_that_fails():
    model = mixed(False)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 7), adapter_names=ROWS)
    assert of_pytorch() == BEFORE


@BOTH_WAYS
def test_a_checkpoint_inside_of_a_checkpoint_takes_the_rows_along(use_reentrant: bool):
    model, plain = mixed(use_reentrant), mixed(None)
    for each in (model, plain):
        loss = each(batch(), adapter_names=ROWS).square().sum() + each(batch(2), adapter_names=ROWS[::-1]).sum()
        loss.backward()
    assert_equal_gradients(model, plain)


@BOTH_WAYS
def test_a_backward_within_another_mixed_batch_has_the_rows_of_its_own(use_reentrant: bool):
    model, plain = mixed(use_reentrant), mixed(None)
    for each in (model, plain):
        loss = each(batch(), adapter_names=ROWS).square().sum()
        with each.mixed_batch(ROWS[::-1]):
            loss.backward()
            each(batch(2)).sum().backward()
    assert_equal_gradients(model, plain)


@BOTH_WAYS
def test_threads_that_mix_at_the_same_time_end_in_any_order(use_reentrant: bool):
    models, plain = [mixed(use_reentrant) for _ in range(2)], [mixed(None) for _ in range(2)]
    for model, rows in zip(plain, (ROWS, ROWS[::-1]), strict=True):
        model(batch(), adapter_names=rows).square().sum().backward()
    first_has_begun, second_has_ended = threading.Event(), threading.Event()

    def first() -> None:
        with models[0].mixed_batch(ROWS):
            first_has_begun.set()
            assert second_has_ended.wait(60)
            loss = models[0](batch()).square().sum()
        loss.backward()

    def second() -> None:
        assert first_has_begun.wait(60)
        models[1](batch(), adapter_names=ROWS[::-1]).square().sum().backward()
        second_has_ended.set()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, expected in zip(models, plain, strict=True):
        assert_equal_gradients(model, expected)
    assert of_pytorch() == BEFORE


def test_a_task_takes_along_what_is_its_own():
    present: ContextVar[int] = ContextVar("present", default=0)

    @contextlib.contextmanager
    def holding(number: int) -> Iterator[None]:
        before = present.get()
        present.set(number)
        yield
        present.set(before)

    def scaled(x: Tensor) -> Tensor:
        return (x * present.get()).square()

    async def task(number: int) -> Tensor:
        x = torch.ones(2, requires_grad=True)
        with taken_along(lambda: holding(number)):
            await asyncio.sleep(0)
            loss = checkpoint(scaled, x, use_reentrant=False).sum()  # type: ignore[union-attr]
            await asyncio.sleep(0)
        loss.backward()
        assert x.grad is not None
        return x.grad

    async def all_tasks() -> list[Tensor]:
        return await asyncio.gather(*(task(number) for number in (2, 3)))

    assert [float(grad[0]) for grad in asyncio.run(all_tasks())] == [8.0, 18.0]
    assert of_pytorch() == BEFORE


@BOTH_WAYS
def test_pytorchs_checkpoints_are_the_same_after_a_trace(use_reentrant: bool):
    model = nn.Sequential(Checkpointed(nn.Linear(5, 5), use_reentrant))
    traced: Any = graphpeft.trace(model, (batch(),))
    assert "is computed again for gradients" in traced.kept["0"]
    assert of_pytorch() == BEFORE


def test_anothers_exchange_of_a_checkpoint_stays(monkeypatch: pytest.MonkeyPatch):
    model, calls = mixed(True), []
    theirs = torch.utils.checkpoint.CheckpointFunction

    class Counted(theirs):
        @classmethod
        def apply(cls, function: Callable[..., Any], *args: Any) -> Any:
            calls.append(function)
            return theirs.apply(function, *args)

    with model.mixed_batch(ROWS):
        monkeypatch.setattr(torch.utils.checkpoint, "CheckpointFunction", Counted)
        model(batch()).sum().backward()
    assert calls
    assert torch.utils.checkpoint.CheckpointFunction is Counted
    monkeypatch.undo()
    assert of_pytorch() == BEFORE
