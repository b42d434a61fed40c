"""Arguments of a call of the model that adapters inside read, as Poly reads the tasks of rows."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from models import LLAMA
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from written_methods import kaiming

import graphpeft
from graphpeft import (
    AdaptError,
    OperationRule,
    ParameterSpec,
    PeftModel,
    PeftType,
    TargetedConfig,
    get_peft_model,
    trace,
)
from graphpeft.rules import registry

# Poly, arXiv:2202.13914: each task mixes low-rank branches, of which the rows of a batch choose by their task


@dataclass(frozen=True)
class Poly(OperationRule):
    call_inputs: ClassVar[tuple[str, ...]] = ("task_ids",)

    splits: int
    skills: int
    rank: int

    def parameters(self, site: Any, config: Any) -> Mapping[str, ParameterSpec]:
        wide, high = site.in_features // self.splits, site.out_features // self.splits
        mixing = ParameterSpec((config.n_tasks, self.splits * self.skills), "poly_router.module_logits")
        return {
            "A": ParameterSpec((self.splits, self.skills, wide, self.rank), "poly_lora_A"),
            "B": ParameterSpec((self.splits, self.skills, self.rank, high), "poly_lora_B"),
            "logits": mixing,
        }

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        kaiming(parameters["A"])
        parameters["B"].normal_(std=0.1)
        parameters["logits"].uniform_(-1e-3, 1e-3)

    def rewrite(self, x: Any, y: Any, task_ids: Any, A: Any, B: Any, logits: Any) -> Any:
        shares = logits[task_ids].unflatten(-1, (self.splits, self.skills)).sigmoid()
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-12)
        down = torch.einsum("bqs,qsdr->bqdr", shares, A).flatten(1, 2)
        up = torch.einsum("bqs,qsrd->bqrd", shares, B).transpose(1, 2).flatten(2)
        return y + torch.bmm(torch.bmm(x, down), up) / self.rank


@dataclass(kw_only=True)
class PolyConfig(TargetedConfig):
    peft_type: ClassVar[Any] = PeftType.POLY
    lacks: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Poly(self.n_splits, self.n_skills, self.r)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    before = registry.registered()
    # an author's own, shorter than that of the library
    registry._REGISTRY.pop(PeftType.POLY)
    graphpeft.register(PolyConfig)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


class Blocks(nn.Module):
    """Two layers inside of modules that know nothing of tasks, one of them checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class Plain(Blocks):
    """The same without checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


OPTIONS: dict[str, Any] = {
    "target_modules": ["first.0", "second.0"],
    "r": 2,
    "n_tasks": 3,
    "n_skills": 2,
    "n_splits": 2,
}
X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
TASKS = torch.tensor([0, 2, 1, 2])


def adapted(base: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base or Blocks(), PolyConfig(**OPTIONS))


def by_hand(model: Any, x: Tensor, tasks: Tensor) -> Tensor:
    """The model row by row, each with its task alone."""
    return torch.cat([model(x[i : i + 1], task_ids=tasks[i : i + 1]) for i in range(len(x))])


def test_the_tasks_of_a_call_reach_layers_inside_as_in_peft(tmp_path: Path) -> None:
    model = adapted().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logits" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs: Any = peft.PeftModel.from_pretrained(Blocks(), str(tmp_path)).eval()
    torch.testing.assert_close(model(X, task_ids=TASKS), theirs.base_model(X, task_ids=TASKS))
    torch.testing.assert_close(model(X, task_ids=TASKS), by_hand(model, X, TASKS))
    assert not torch.equal(model(X, task_ids=TASKS), model(X, task_ids=TASKS.flip(0)))
    torch.manual_seed(0)
    loaded: Any = PeftModel.from_pretrained(Blocks(), tmp_path).eval()
    assert torch.equal(loaded(X, task_ids=TASKS), model(X, task_ids=TASKS))


def test_a_call_without_them_says_what_it_needs() -> None:
    model = adapted()
    with pytest.raises(TypeError, match=r"an active adapter needs task_ids in each call: model\(…, task_ids=…\)"):
        model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), model(X, task_ids=TASKS))
    assert torch.equal(model.unload()(X), adapted().unload()(X))


def test_a_forward_that_has_such_an_argument_gets_it_too() -> None:
    class Knowing(Blocks):
        def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
            assert task_ids is not None
            return super().forward(x) + task_ids[:, None, None]

    plain = adapted()
    torch.manual_seed(0)
    model = get_peft_model(Knowing(), PolyConfig(**OPTIONS))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(X, task_ids=TASKS), plain(X, task_ids=TASKS) + TASKS[:, None, None])


def test_what_is_checkpointed_has_them_in_the_backward_too() -> None:
    model = adapted().train()
    model(X, task_ids=TASKS).sum().backward()
    layer = model.first[0]
    assert layer.default.logits.grad[TASKS.unique()].abs().sum() > 0
    assert layer.default.A.grad is not None


def test_a_trace_reads_them_as_the_model_does() -> None:
    torch.manual_seed(0)
    base = Plain().eval()
    model, flat = adapted(copy.deepcopy(base)), adapted(trace(base, (X,)))
    assert torch.equal(flat(X, task_ids=TASKS), model(X, task_ids=TASKS))
    with pytest.raises(TypeError, match="needs task_ids"):
        flat(X)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_follows_them(fullgraph: bool) -> None:
    model = adapted(Plain()).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for tasks in (TASKS, TASKS.flip(0), torch.zeros(4, dtype=torch.long)):
        torch.testing.assert_close(compiled(X, task_ids=tasks), model(X, task_ids=tasks))
    with pytest.raises(Exception, match="needs task_ids"):
        compiled(X)


def test_threads_and_tasks_have_their_own() -> None:
    model = adapted().eval()
    expected = {i: model(X, task_ids=torch.full((4,), i)) for i in range(3)}
    found: dict[int, Tensor] = {}
    barrier = threading.Barrier(3)

    def run(i: int) -> None:
        barrier.wait()
        for _ in range(20):
            found[i] = model(X, task_ids=torch.full((4,), i))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(3))

    async def in_task(i: int) -> Tensor:
        await asyncio.sleep(0)
        return model(X, task_ids=torch.full((4,), i))

    async def all_tasks() -> list[Tensor]:
        return await asyncio.gather(*(in_task(i) for i in range(3)))

    assert all(torch.equal(got, expected[i]) for i, got in enumerate(asyncio.run(all_tasks())))


def test_rows_of_several_adapters_and_merging_are_refused() -> None:
    model = adapted()
    model.add_adapter("second", PolyConfig(**OPTIONS))
    with pytest.raises(AdaptError, match="reads task_ids of a whole batch"):
        model(X, task_ids=TASKS, adapter_names=["default"] * 4)
    with pytest.raises(AdaptError):
        model.merge_adapter()


def test_tokens_are_generated_for_tasks() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(LLAMA.make().eval(), PolyConfig(**{**OPTIONS, "target_modules": ["q_proj", "v_proj"]}))
    ids = torch.randint(0, 20, (2, 4))
    for tasks in (torch.tensor([0, 1]), torch.tensor([2, 0])):
        generated = model.generate(ids, task_ids=tasks, max_new_tokens=3, do_sample=False)
        expected = ids
        for _ in range(3):
            following = model(expected, task_ids=tasks).logits[:, -1].argmax(-1)
            expected = torch.cat((expected, following[:, None]), 1)
        assert torch.equal(generated, expected)
    with pytest.raises(AdaptError, match="use one beam"):
        model.generate(ids, task_ids=torch.tensor([0, 1]), max_new_tokens=3, num_beams=2)


def test_a_copy_and_a_second_adapter_know_what_they_read() -> None:
    model = adapted().eval()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X, task_ids=TASKS), model(X, task_ids=TASKS))
    model.delete_adapter("default")
    with pytest.raises(TypeError, match="task_ids"):
        model(X, task_ids=TASKS)
