"""Runs of a batch leave a model as it was: weights that a forward overwrites, plain tensors, generators, optimizers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from interrupting import failing_at_line, lines_of
from torch import Tensor, nn

from graphpeft import LoraConfig, TaskType, check_learning, explain, get_peft_model, show

pytestmark = pytest.mark.quick("learning")

SIZE = 4
CONFIG = LoraConfig(r=2, target_modules=["layer"])


class Averaging(nn.Module):
    """Keeps an average of a layer's weights, as momentum encoders do, by one of several ways to write."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.layer, self.average, self.write = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), write
        self.shift, self.count = torch.zeros(SIZE, requires_grad=True), torch.zeros(1)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        with torch.no_grad():
            self.write(self.average.weight, self.layer.weight)
        noise = torch.rand(SIZE, generator=self.generator)
        return self.layer(x) + self.average(x) + self.shift + noise


def set_data(average: Any, weight: Tensor) -> None:
    average.data = 0.5 * weight


@torch.library.custom_op("graphpeft_tests::halve", mutates_args={"tensor"})
def halve(tensor: Tensor) -> None:
    tensor.mul_(0.5)


WRITES = {
    "in place": lambda average, weight: average.mul_(0.5).add_(weight),
    "operator": lambda average, weight: average.__imul__(0.5),
    "by item": lambda average, weight: average.__setitem__(0, 1.0),
    "through data": lambda average, weight: average.data.copy_(weight),
    "through a view": lambda average, weight: average[1].add_(1),
    "new data": set_data,
    "many": lambda average, weight: torch.nn.utils.vector_to_parameters(1 * weight.flatten(), [average]),
    "by a flag": lambda average, weight: nn.functional.relu(average, inplace=True),
    "by name": lambda average, weight: torch.relu_(input=average),
    "statistics": lambda average, weight: nn.functional.batch_norm(weight, average[0], average[1], training=True),
    "overload": lambda average, weight: torch.ops.aten.mul_.Tensor(average, 2),
    "operator of one's own": lambda average, weight: halve(average),
    "out": lambda average, weight: torch.mul(weight, 2, out=average),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("run", ["check", "explain", "show"])
def test_a_model_that_overwrites_its_weights_is_as_before(write: str, run: str, tmp_path: Path):
    model: Any = Averaging(WRITES[write])
    if run != "explain":
        get_peft_model(model, CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointer, state = model.average.weight.data_ptr(), model.generator.get_state()
    batch = (torch.randn(3, SIZE),)
    if run == "check":
        assert check_learning(model, batch).dead == ()
    elif run == "explain":
        assert explain(model, CONFIG, example_inputs=batch).learning.dead == ()
    else:
        show(model, tmp_path / "model.html", example_inputs=batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.average.weight.data_ptr() == pointer
    assert model.shift.grad is None
    assert not model.count.any()
    assert torch.equal(model.generator.get_state(), state)


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_whose_rows_are_shortened_is_as_before(table: Any, tmp_path: Path):
    model: Any = nn.Sequential(table(8, SIZE, max_norm=0.1), nn.Linear(SIZE, SIZE))
    before = model[0].weight.clone()
    get_peft_model(model, LoraConfig(r=2, target_modules=["1"]))
    tokens = torch.tensor([[1, 2]])
    assert check_learning(model, (tokens,)).dead == ()
    show(model, tmp_path / "model.html", example_inputs=(tokens,))
    assert torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_model_with_a_scripted_part_is_checked_and_shown(tmp_path: Path):
    model = get_peft_model(
        nn.Sequential(nn.Linear(SIZE, SIZE), torch.jit.script(nn.BatchNorm1d(SIZE))),
        LoraConfig(r=2, target_modules=["0"]),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = (torch.randn(3, SIZE),)
    assert check_learning(model, batch).dead == ()
    show(model, tmp_path / "model.html", example_inputs=batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_is_compiled_as_a_whole_runs_its_own_code(backend: str, tmp_path: Path):
    class Losing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lost, self.kept = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept(x) + self.lost(x).detach()

    model = get_peft_model(Losing(), LoraConfig(r=2, target_modules=["lost", "kept"])).train()
    model.compile(backend=backend, fullgraph=True)
    batch = (torch.randn(3, SIZE),)
    expected = model(*batch)
    (site,) = check_learning(model, batch).dead
    assert "self.lost(x).detach()" in site.line
    show(model, tmp_path / "model.html", example_inputs=batch)
    assert torch.equal(model(*batch), expected)


def test_an_optimizer_that_steps_in_the_backward_takes_no_step():
    model: Any = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), LoraConfig(r=2, target_modules=["0"]))
    optimizers = {each: torch.optim.Adam([each]) for each in model.parameters() if each.requires_grad}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for each in optimizers:
        each.register_post_accumulate_grad_hook(step)
    assert check_learning(model, (torch.randn(3, SIZE),)).dead == ()
    assert not any(optimizer.state for optimizer in optimizers.values())
    model(torch.randn(3, SIZE)).sum().backward()
    assert all(optimizer.state for optimizer in optimizers.values())


def test_a_tokenizer_s_batch_is_taken_as_it_is():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    model = get_peft_model(
        transformers.BertForSequenceClassification(config),
        LoraConfig(r=2, target_modules=["query"], task_type=TaskType.SEQ_CLS),
    )
    batch = transformers.BatchEncoding({"input_ids": torch.randint(0, 50, (2, 5)), "labels": torch.tensor([0, 1])})
    assert check_learning(model, batch).dead == ()


@pytest.mark.parametrize("run", ["check", "show"])
def test_a_run_that_is_interrupted_leaves_the_model_as_it_was(run: str, tmp_path: Path):
    model: Any = get_peft_model(Averaging(WRITES["in place"]), CONFIG)
    batch = (torch.randn(3, SIZE),)

    def call() -> Any:
        if run == "check":
            return check_learning(model, batch)
        return show(model, tmp_path / "model.html", example_inputs=batch)

    def state() -> list[Any]:
        hooks = [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]
        return [hooks, model.count.tolist(), *(value.tolist() for value in model.state_dict().values())]

    call()  # later ones find what it has cached, and run the same lines
    before, lines = state(), lines_of(call)
    in_question = ("transaction.py", "learning/watch.py", "showing/measuring.py")
    numbers = [number for number, line in enumerate(lines, 1) if line[0] in in_question]
    for number in {lines[number - 1]: number for number in numbers}.values():
        with failing_at_line(number, KeyboardInterrupt) as where, contextlib.suppress(KeyboardInterrupt):
            call()
        assert state() == before, where
