"""Poly beside PEFT's: its numbers, its files, its training, and the models whose layers it gives tasks to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from kinds import ROUNDED
from models import BERT, LLAMA, T5, Example
from oracle import moved
from safetensors.torch import load_file
from torch import Tensor, nn
from trainers import losses, tokens, trainer_of
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, PolyConfig, get_peft_model
from graphpeft.testing import verify

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through", "ignore:::peft")

OPTIONS: dict[str, Any] = {"r": 3, "n_tasks": 4, "n_skills": 3, "n_splits": 2}
IN_LLAMA: dict[str, Any] = OPTIONS | {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TASKS = torch.tensor([3, 0, 2, 3])


class Told(nn.Module):
    """Layers in a model whose forward has the tasks as an argument, and ignores them."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = layer or nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def told() -> Any:
    torch.manual_seed(0)
    return Told()


X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
IN_TOLD: dict[str, Any] = OPTIONS | {"target_modules": ["first", "second"]}


def by_peft(model: Any, x: Tensor, tasks: Tensor) -> Tensor:
    """Returns the outputs of a model of PEFT's, whose inner wrapper alone knows of tasks."""
    return model.base_model(x, task_ids=tasks)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# numbers and files


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("splits", [1, 2])
def test_equal_seeds_give_pefts_values_and_then_equal_numbers(splits: int, init_weights: bool, tmp_path: Path):
    following = []
    for library in (peft, graphpeft):
        model: Any = told()
        torch.manual_seed(7)
        config = library.PolyConfig(**IN_TOLD | {"n_splits": splits, "init_weights": init_weights})  # type: ignore[attr-defined]
        model = library.get_peft_model(model, config)  # type: ignore[attr-defined]
        following.append(torch.rand(2))
        model.save_pretrained(str(tmp_path / library.__name__))
    ours, theirs = (tensors_in(tmp_path / name) for name in ("graphpeft", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(*following)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_go_both_ways(dtype: torch.dtype, tmp_path: Path):
    theirs = moved(peft.get_peft_model(told().to(dtype), peft.PolyConfig(**IN_TOLD)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours: Any = PeftModel.from_pretrained(told().to(dtype), tmp_path / "theirs")
    x = X.to(dtype)
    found, expected = ours(x, task_ids=TASKS), by_peft(theirs, x, TASKS)
    assert found.dtype == expected.dtype == dtype
    tolerance: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    assert not torch.allclose(found, ours(x, task_ids=TASKS.flip(0)), atol=1e-2)
    ours.save_pretrained(tmp_path / "ours")
    written, read = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: t.dtype for name, t in read.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in read.items())
    again = peft.PeftModel.from_pretrained(told().to(dtype), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(by_peft(again, x, TASKS), expected)


def test_a_training_step_draws_shares_as_pefts_does(tmp_path: Path):
    theirs: Any = moved(peft.get_peft_model(told(), peft.PolyConfig(**IN_TOLD)))
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(told(), tmp_path, is_trainable=True)
    models = {"base_model.model.": theirs.train(), "": ours.train()}
    outputs, gradients = [], []
    for model in models.values():
        torch.manual_seed(5)
        outputs.append(by_peft(model, X, TASKS) if model is theirs else model(X, task_ids=TASKS))
        outputs[-1].square().sum().backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(sorted((p.grad for p in parameters), key=lambda grad: (grad.shape, grad.abs().sum())))  # type: ignore[union-attr]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    ours.eval()
    assert torch.equal(ours(X, task_ids=TASKS), ours(X, task_ids=TASKS))


@pytest.mark.parametrize("example", [LLAMA, BERT, T5], ids=str)
def test_defaults_name_the_targets_that_pefts_do(example: Example):
    models = [library.get_peft_model(example.build(), library.PolyConfig()) for library in (peft, graphpeft)]  # type: ignore[attr-defined]
    names = [{key.rpartition(".poly")[0] for key in library_state(model)} for model in models]
    assert names[0] == names[1]


def library_state(model: Any) -> dict[str, Tensor]:
    own = isinstance(model, PeftModel)
    return (graphpeft if own else peft).get_peft_model_state_dict(model)  # type: ignore[attr-defined]


# tasks


def test_each_row_has_the_skills_of_its_task():
    model = moved(get_peft_model(told(), PolyConfig(**IN_TOLD)))
    alone = torch.cat([model(X[row : row + 1], task_ids=TASKS[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(model(X, task_ids=TASKS), alone)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 6)], ids=str)
def test_an_input_may_have_any_number_of_dimensions(shape: tuple[int, ...]):
    model = moved(get_peft_model(told(), PolyConfig(**IN_TOLD)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = model(x.reshape(4, -1, 6), task_ids=TASKS).reshape(*shape[:-1], 4)
    torch.testing.assert_close(model(x, task_ids=TASKS), expected)


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ([0, 1], r"task_ids has the shape \(2,\), and an adapted layer is given 4 rows"),
        ([0], r"task_ids has the shape \(1,\), and an adapted layer is given 4 rows"),
        ([0, 1, 4, 2], r"task_ids has 4, and the adapter's tasks are 0 to 3"),
        ([0, -1, 1, 2], r"task_ids has -1, and the adapter's tasks are 0 to 3"),
    ],
)
def test_tasks_that_cannot_be_are_refused(tasks: list[int], reason: str):
    model = get_peft_model(told(), PolyConfig(**IN_TOLD))
    with pytest.raises(ValueError, match=reason):
        model(X, task_ids=torch.tensor(tasks))


def test_a_call_without_tasks_says_what_it_needs():
    model: Any = get_peft_model(told(), PolyConfig(**IN_TOLD))
    with pytest.raises(TypeError, match="an active adapter needs task_ids in each call"):
        model(X)


def test_layers_and_options_that_cannot_be_are_refused():
    with pytest.raises(AdaptError, match="n_splits=5 doesn't divide its 6 inputs"):
        get_peft_model(told(), PolyConfig(n_splits=5, target_modules=["first"]))
    with pytest.raises(AdaptError, match="it is a Conv1D, which has rows and positions in one dimension"):
        get_peft_model(Told(Conv1D(8, 6)), PolyConfig(**IN_TOLD))
    with pytest.raises(ValueError, match="poly_type must be"):
        PolyConfig(poly_type="other")  # type: ignore[arg-type]


# several adapters


def test_it_is_not_merged_and_no_row_of_a_mixed_batch():
    model = moved(get_peft_model(told(), PolyConfig(**IN_TOLD)))
    before = model(X, task_ids=TASKS)
    with pytest.raises(AdaptError, match="Poly mixes its skills by the tasks of each call"):
        model.merge_adapter()
    with pytest.raises(AdaptError, match="reads task_ids of a whole batch"):
        model(X, task_ids=TASKS, adapter_names=["default"] * 4)
    assert torch.equal(model(X, task_ids=TASKS), before)


def test_it_acts_beside_others_and_goes():
    model: Any = get_peft_model(told(), PolyConfig(**IN_TOLD))
    other: dict[str, Any] = IN_TOLD | {"r": 2, "n_splits": 1}
    model.add_adapter("second", PolyConfig(**other))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    outputs = {}
    for names in (["default"], ["second"], ["lora"]):
        model.set_adapter(names)
        outputs[names[0]] = moved(model)(X, task_ids=TASKS)
    model.set_adapter(["default", "second", "lora"])
    together = model(X, task_ids=TASKS)
    with model.disable_adapter():
        assert torch.equal(model(X), told()(X))
    assert torch.equal(model(X, task_ids=TASKS), together)
    for names in (["default"], ["second"], ["lora"]):
        model.set_adapter(names)
        assert torch.equal(model(X, task_ids=TASKS), outputs[names[0]])
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(X, task_ids=TASKS), outputs["default"])
    assert torch.equal(model.unload()(X), told()(X))


# the laws


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 8), lambda: ROUNDED.build()[0]], ids=["linear", "rounded"])  # type: ignore[index]
@pytest.mark.parametrize("init_weights", [True, False])
def test_every_law_holds(layer: Any, init_weights: bool):
    torch.manual_seed(0)
    model = Told(layer())
    config = PolyConfig(**IN_TOLD, init_weights=init_weights)
    verification = verify(model, config, {"x": X, "task_ids": TASKS}, progress=False, quiet=True)
    assert verification.holds, verification


# a whole model


def test_a_llama_has_pefts_outputs_and_generates_with_tasks(tmp_path: Path):
    theirs: Any = moved(peft.get_peft_model(LLAMA.build(), peft.PolyConfig(**IN_LLAMA)))
    theirs.save_pretrained(str(tmp_path))
    ours: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    tasks = torch.tensor([1, 3])
    expected = theirs(input_ids=tokens(), task_ids=tasks).logits
    torch.testing.assert_close(ours(input_ids=tokens(), task_ids=tasks).logits, expected, atol=1e-5, rtol=1e-4)
    options: dict[str, Any] = {"task_ids": tasks, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(tokens(), **options), theirs.generate(input_ids=tokens(), **options))


def test_a_trainer_gives_pefts_losses_and_goes_on_from_a_checkpoint(tmp_path: Path):
    rows = [
        {"input_ids": row, "labels": row, "task_ids": (seed + at) % 4}
        for seed in range(4)
        for at, row in enumerate(tokens(seed))
    ]
    options: dict[str, Any] = {"learning_rate": 0.05, "remove_unused_columns": False}

    def adapted(library: Any) -> Any:
        model = LLAMA.build()
        torch.manual_seed(5)
        return library.get_peft_model(model, library.PolyConfig(**IN_LLAMA, init_weights=False))

    found = {}
    for library in (peft, graphpeft):
        trainer = trainer_of(adapted(library), tmp_path / library.__name__, rows, **options)
        trainer.train()
        found[library.__name__] = losses(trainer)
    assert len(set(found["graphpeft"])) == 4
    assert found["graphpeft"] == pytest.approx(found["peft"], rel=1e-4)
    again = trainer_of(adapted(graphpeft), tmp_path / "again", rows, **options)
    again.train(str(tmp_path / "graphpeft" / "checkpoint-2"))
    assert losses(again) == pytest.approx(found["graphpeft"], rel=1e-5)


# compiled and exported


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
def test_compiled_it_computes_and_trains_the_same(backend: str):
    model = moved(get_peft_model(told(), PolyConfig(**IN_TOLD)))
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    for tasks in (TASKS, TASKS.flip(0)):
        torch.testing.assert_close(compiled(X, task_ids=tasks), model(X, task_ids=tasks), atol=1e-5, rtol=1e-4)
    model.train()
    gradients = []
    for run in (model, compiled):
        torch.manual_seed(2)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(run(X, task_ids=TASKS).square().mean(), trained))
    if backend != "inductor":  # which draws other numbers
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert all(bool(each.isfinite().all()) for each in gradients[1])


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported_it_computes_the_same(suffix: str, tmp_path: Path):
    model = moved(get_peft_model(told(), PolyConfig(**IN_TOLD)))
    file = tmp_path / f"model.{suffix}"
    graphpeft.export(model, {"x": X, "task_ids": TASKS}, file, format=suffix, adapters="baked")
    tasks = TASKS.flip(0)
    if suffix == "pt2":
        found = torch.export.load(file).module()(x=X, task_ids=tasks)
    else:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": X.numpy(), "task_ids": tasks.numpy()})[0])
    torch.testing.assert_close(found, model(X, task_ids=tasks), atol=1e-5, rtol=1e-4)


def test_copies_stay_adapted():
    model = moved(get_peft_model(told(), PolyConfig(**IN_TOLD)))
    assert torch.equal(copy.deepcopy(model)(X, task_ids=TASKS), model(X, task_ids=TASKS))
