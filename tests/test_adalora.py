"""AdaLoRA's training beside PEFT's: its budget of ranks, its penalty, its loop, and the files that it leaves."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from models import GPT2, LLAMA, Example, output
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from trainers import losses, trainer_of

import graphpeft
from graphpeft import (
    AdaLoraConfig,
    AdaptError,
    LoraConfig,
    PeftModel,
    PeftWarning,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    penalty_of,
    update_and_allocate_callback,
)
from graphpeft.methods.adalora import allocation

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:no gradient goes through")

STEPS = 60
# without a task, PEFT adds no penalty
LANGUAGE: dict[str, Any] = {"task_type": "CAUSAL_LM", "total_step": STEPS, "lora_alpha": 16, "orth_reg_weight": 0.3}
BUDGET: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": 5, "tfinal": 10}


def tokens(step: int, rows: int = 4) -> Tensor:
    return torch.randint(3, 64, (rows, 9), generator=torch.Generator().manual_seed(step))


def adapted(library: Any, example: Example = LLAMA, **options: Any) -> Any:
    model = example.build()
    torch.manual_seed(1)
    return library.get_peft_model(model, library.AdaLoraConfig(**LANGUAGE | BUDGET | example.lora | options)).train()


def pattern_of(model: Any) -> dict[str, list[bool]] | None:
    found = model.peft_config["default"].rank_pattern
    return found and {name.replace(".default", ""): mask for name, mask in found.items()}


def trained(model: Any, steps: int = STEPS) -> Iterator[tuple[float, dict[str, list[bool]] | None]]:
    """Yields the loss of each step, and which ranks are left after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        ids = tokens(step)
        torch.manual_seed(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield loss.item(), copy.deepcopy(pattern_of(model))


def file_in(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"], "deltaT": 3, "lora_dropout": 0.1}),
        (LLAMA, {"target_modules": "all-linear", "beta1": 0.5, "beta2": 0.7, "bias": "all"}),
        (LLAMA, {"target_modules": ["q_proj"], "tfinal": 0, "modules_to_save": ["lm_head"]}),
        (GPT2, {"target_modules": ["c_attn"], "deltaT": 7, "orth_reg_weight": 0.0, "fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_each_of_60_steps_drops_the_ranks_that_pefts_drops(example: Example, options: dict[str, Any], tmp_path: Path):
    models = {library.__name__: adapted(library, example, **options) for library in (graphpeft, peft)}
    ours, theirs = ([*trained(model)] for model in models.values())
    assert [pattern for _, pattern in ours] == [pattern for _, pattern in theirs]
    assert len({str(pattern) for _, pattern in ours}) > 4
    torch.testing.assert_close(*(torch.tensor([loss for loss, _ in each]) for each in (ours, theirs)))
    for name, model in models.items():
        model.eval().save_pretrained(str(tmp_path / name))
    (found, our_config), (expected, their_config) = (file_in(tmp_path / name) for name in models)
    for config in (our_config, their_config):
        config["target_modules"].sort()
    assert our_config == their_config
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tensor.shape for n, tensor in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    inputs = example.inputs()
    for folder in models:
        for library in (peft, graphpeft):
            loaded = library.PeftModel.from_pretrained(example.build(), str(tmp_path / folder)).eval()
            torch.testing.assert_close(output(loaded, inputs), output(models[folder], inputs))


def test_a_budget_falls_from_the_first_to_the_last_number():
    schedule = allocation.Schedule(first=60, last=20, begin=5, end=50)
    assert [schedule.budget(step) for step in (0, 5, 50, 51, 999)] == [60, 60, 20, 20, 20]
    falling = [schedule.budget(step) for step in range(5, 51)]
    assert falling == sorted(falling, reverse=True)
    assert falling[1] == int(40 * (44 / 45) ** 3 + 20)


@pytest.mark.parametrize("target_r", [6, 9])
def test_without_a_smaller_target_all_ranks_stay(target_r: int):
    # PEFT's kthvalue fails at the first allocation
    (*_, (_, pattern)) = trained(adapted(graphpeft, target_r=target_r), steps=12)
    assert all(map(all, (pattern or {}).values()))


# files


class Two(nn.Module):
    """Two layers, the first of which may lose all of its ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two()


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


def of_two(**options: Any) -> AdaLoraConfig:
    given: dict[str, Any] = {"init_r": 3, "target_r": 1, "total_step": 8, "target_modules": ["first", "second"]}
    return AdaLoraConfig(**given | options)


def steps(model: Any, numbers: range, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for step in numbers:
        (model(X).square().mean() + penalty_of(model)).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()


PATTERN = {"first.lora_E": [False, False, False], "second.lora_E": [True, False, True]}


def test_a_layer_without_any_rank_is_read_and_written_as_pefts(tmp_path: Path):
    model: Any = get_peft_model(two(), of_two(rank_pattern=PATTERN, init_lora_weights=False))
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(two(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(X), model(X))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again: Any = PeftModel.from_pretrained(two(), tmp_path / "theirs")
    torch.testing.assert_close(again(X), model(X))
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(again).items()}
    assert shapes["base_model.model.first.lora_A"] == (0, 6)
    assert shapes["base_model.model.second.lora_B"] == (4, 2)


def test_training_goes_on_from_a_file_without_the_ranks_that_it_lacks(tmp_path: Path):
    model: Any = get_peft_model(two(), of_two(init_r=5, target_r=2))
    steps(model, range(8))
    model.save_pretrained(tmp_path)
    before = model.peft_config["default"].rank_pattern
    again: Any = PeftModel.from_pretrained(two(), tmp_path, is_trainable=True)
    again.peft_config["default"].target_r = 1
    steps(again, range(8))
    after = again.peft_config["default"].rank_pattern
    assert sum(map(sum, before.values())) > sum(map(sum, after.values())) >= 2
    assert all(not now or was for name in before for was, now in zip(before[name], after[name], strict=True))
    again.save_pretrained(tmp_path / "again")
    for library in (peft, graphpeft):
        loaded = library.PeftModel.from_pretrained(two(), str(tmp_path / "again")).eval()
        torch.testing.assert_close(loaded(X), again(X))


def test_ranks_of_a_file_that_came_later_replace_the_models(tmp_path: Path):
    model: Any = get_peft_model(two(), of_two())
    steps(model, range(5))
    model.save_pretrained(tmp_path)
    again: Any = get_peft_model(two(), of_two())
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    assert again.get_submodule("first").default.lora_E.shape == (3, 1)
    torch.testing.assert_close(again(X), model(X))
    changed = get_peft_model(two(), of_two(lora_alpha=3))
    with pytest.raises(AdaptError, match="with other options"):
        changed.load_adapter(tmp_path, "default")
    assert changed.peft_config["default"].rank_pattern is None


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(
        ValueError, match=r"rank_pattern says of first\.lora_E which of other numbers of ranks than init_r"
    ):
        of_two(rank_pattern={"first.lora_E": [True]})


# the loop


def test_a_model_has_the_loops_method_as_long_as_an_adapter_needs_it():
    model: Any = get_peft_model(two(), LoraConfig(target_modules=["first"]))
    assert not hasattr(model, "update_and_allocate")
    model.add_adapter("ranks", of_two())
    assert hasattr(model, "update_and_allocate")
    assert hasattr(model.base_model, "update_and_allocate")
    with pytest.raises(AdaptError, match="no adapter that is trained now changes after a step"):
        model.update_and_allocate(1)
    model.delete_adapter("ranks")
    assert not hasattr(model, "update_and_allocate")


def test_steps_need_gradients_and_steps_before():
    model: Any = get_peft_model(two(), of_two())
    with pytest.raises(AdaptError, match=r"lora_A of first has no gradient; call update_and_allocate after backward"):
        model.update_and_allocate(1)
    with pytest.raises(AdaptError, match="no importance is known at step 8"):
        model.update_and_allocate(8)
    with pytest.raises(AdaptError, match="no ranks were dropped until step 8"):
        model.update_and_allocate(9)
    assert model.peft_config["default"].rank_pattern is None


def test_a_step_whose_gradients_overflowed_does_not_count():
    model: Any = get_peft_model(two(), of_two())
    steps(model, range(3))
    config = model.peft_config["default"]
    before = config._averages
    model(X).sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad.fill_(float("inf"))
    model.update_and_allocate(3)
    for place, (mean, spread) in config._averages.items():
        assert torch.equal(mean, before[place].mean)
        assert torch.equal(spread, before[place].spread)


def test_a_copy_in_the_middle_goes_on_as_the_model_does():
    model: Any = get_peft_model(two(), of_two())
    steps(model, range(4))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        steps(each, range(4, 8))
    assert model.peft_config["default"].rank_pattern == copied.peft_config["default"].rank_pattern
    assert torch.equal(model(X), copied(X))


def test_two_trained_adapters_have_a_budget_each():
    model: Any = get_peft_model(two(), of_two())
    model.add_adapter("second", of_two(init_r=4, target_r=3, total_step=5, target_modules=["second"]))
    model.set_adapter(["default", "second"])
    steps(model, range(9))
    left = {name: sum(map(sum, config.rank_pattern.values())) for name, config in model.peft_config.items()}
    assert left == {"default": 2, "second": 3}


def test_adapters_are_not_combined():
    model: Any = get_peft_model(two(), of_two())
    model.add_adapter("second", of_two())
    with pytest.raises(AdaptError, match=r"aren't combined, as in PEFT; convert_to_lora makes LoRA of each"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert list(model.peft_config) == ["default", "second"]


def test_it_becomes_plain_lora():
    model: Any = get_peft_model(two(), of_two(init_lora_weights=False))
    config, tensors = convert_to_lora(model, rank=3)
    plain: Any = get_peft_model(two(), config)
    graphpeft.set_peft_model_state_dict(plain, tensors)
    torch.testing.assert_close(plain(X), model(X))


# the penalty


def test_the_penalty_is_the_distance_of_a_and_b_from_orthogonal_ones():
    model: Any = get_peft_model(two(), of_two(orth_reg_weight=0.4, init_lora_weights=False))
    norms = []
    for path in ("first", "second"):
        factors = model.get_submodule(path).default
        A, B = factors.lora_A, factors.lora_B
        norms += [torch.norm(A @ A.T - torch.eye(3)), torch.norm(B.T @ B - torch.eye(3))]
    torch.testing.assert_close(penalty_of(model), 0.4 * sum(norms) / 4)  # type: ignore[arg-type]
    with model.disable_adapter():
        assert penalty_of(model) == 0
    model.set_adapter("default", inference_mode=True)
    assert penalty_of(model) == 0


def test_the_loss_of_a_batch_with_an_adapter_for_each_row_has_it_too():
    model = adapted(graphpeft).eval()
    model.add_adapter("other", LoraConfig(**LLAMA.lora, init_lora_weights=False))
    ids = tokens(0, rows=2)
    alone = model(input_ids=ids, labels=ids).loss - penalty_of(model)
    mixed = model(input_ids=ids, labels=ids, adapter_names=["default", "default"]).loss
    torch.testing.assert_close(mixed, alone + penalty_of(model))
    assert not torch.isclose(mixed, alone)


# options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"total_step": None}, "total_step must be the number of steps"),
        ({"total_step": 0}, "total_step must be the number of steps"),
        ({"tinit": 4, "tfinal": 4}, "tinit=4 and tfinal=4 leave none of the 8 steps"),
        ({"use_dora": True}, "use_dora isn't for AdaLoRA"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq_config isn't for AdaLoRA"),
        ({"orth_reg_weight": -0.5}, "orth_reg_weight must be a finite number from 0 on"),
        ({"beta2": 1.0}, "beta2 must be a number between 0 and 1"),
        ({"deltaT": 0}, "deltaT must be a positive integer"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        of_two(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"use_rslora": True},
        {"alpha_pattern": {"first": 3}},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_what_has_no_effect_in_peft_has_none_and_is_told(options: dict[str, Any]):
    torch.manual_seed(2)
    with pytest.warns(PeftWarning, match=f"{next(iter(options))}=.* has no effect in AdaLoRA"):
        model = get_peft_model(two(), of_two(**options))
    torch.manual_seed(2)
    plain = get_peft_model(two(), of_two())
    found, expected = (get_peft_model_state_dict(each) for each in (model, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_layers_of_lora_that_it_is_not_for_are_refused():
    with pytest.raises(AdaptError, match="isn't for weights of the kind Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(5, 4)), AdaLoraConfig(target_modules=["0"], total_step=4))


# what PEFT has no layers for


class Beyond(nn.Module):
    """A stack of matrices, a plain matrix, an attention and a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 2)
        self.matrix = nn.Parameter(torch.randn(6, 8) / 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bi,eoi->beo", x, self.experts) @ self.matrix
        return self.conv(self.attention(x, x, x)[0].mT)


@pytest.mark.filterwarnings("ignore:.*target_parameters")
def test_ranks_of_any_weights_share_a_budget(tmp_path: Path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Beyond()

    names = ["experts", "matrix", "attention", "conv"]
    model: Any = get_peft_model(build(), of_two(target_modules=names, target_r=2))
    steps(model, range(8))
    pattern = model.peft_config["default"].rank_pattern
    assert set(pattern) == {
        f"{name}.lora_E"
        for name in ("experts", "matrix", "attention.in_proj_weight", "attention.out_proj.weight", "conv")
    }
    assert 10 <= sum(map(sum, pattern.values())) < 15
    model.eval().save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X))
    torch.testing.assert_close(loaded.merge_and_unload()(X), model(X))


# whole trainings


def trainer_for(model: Any, folder: Path, save_steps: int = 6) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for seed in range(8) for row in tokens(seed, rows=2)]
    callbacks = [update_and_allocate_callback()]
    return trainer_of(model, folder, rows, callbacks, max_steps=8, save_steps=save_steps, learning_rate=0.02)


IN_TRAINER: dict[str, Any] = {"total_step": 8, "tinit": 1, "tfinal": 3}


def test_a_trainer_with_the_callback_trains_as_with_peft(tmp_path: Path):
    found = {}
    for library in (peft, graphpeft):
        model = adapted(library, **IN_TRAINER)
        trainer = trainer_for(model, tmp_path / library.__name__)
        trainer.train()
        found[library.__name__] = losses(trainer), pattern_of(model)
    assert found["graphpeft"][1] == found["peft"][1]
    assert found["graphpeft"][0] == pytest.approx(found["peft"][0], rel=1e-4)
    kept = (found["graphpeft"][1] or {}).values()
    assert sum(map(sum, kept)) == 2 * len(kept)


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_a_trainer_resumes_in_every_phase_as_if_it_had_not_stopped(steps: int, tmp_path: Path):
    model = adapted(graphpeft, **IN_TRAINER)
    whole = trainer_for(model, tmp_path / "whole", save_steps=steps)
    whole.train()
    again = adapted(graphpeft, **IN_TRAINER)
    resumed = trainer_for(again, tmp_path / "resumed", save_steps=steps)
    resumed.train(str(tmp_path / "whole" / f"checkpoint-{steps}"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert pattern_of(again) == pattern_of(model)


def test_the_callback_leaves_other_models_alone(tmp_path: Path):
    model: Any = get_peft_model(LLAMA.build(), LLAMA.config(task_type="CAUSAL_LM"))
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    assert len(losses(trainer)) == 8


def test_digits_are_learned_with_the_ranks_that_are_left():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    options: dict[str, Any] = {"init_r": 8, "target_r": 3, "tinit": 20, "tfinal": 200, "deltaT": 5, "total_step": 320}
    model: Any = get_peft_model(base, AdaLoraConfig(**options, lora_alpha=16, target_modules=["0", "2", "4"]))

    def share() -> float:
        return (model(x[1200:]).argmax(-1) == y[1200:]).float().mean().item()

    assert share() < 0.3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for step in range(320):
        chosen = torch.randint(1200, (128,))
        (F.cross_entropy(model(x[chosen]), y[chosen]) + penalty_of(model)).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert share() > 0.75
    shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    ranks = [shapes[f"base_model.model.{layer}.lora_E"][0] for layer in (0, 2, 4)]
    assert sum(ranks) == 9
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), model(x), atol=1e-4, rtol=1e-4)


def test_rows_with_adapters_of_their_own_are_exported(tmp_path: Path):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8)).eval()
    for name in ("one", "two"):
        options: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False}
        get_peft_model(model, AdaLoraConfig(target_modules=["0"], **options), name)
    x = torch.randn(3, 8)
    report = graphpeft.export(model.eval(), (x,), tmp_path / "model.pt2", "pt2", adapters="rows")
    assert len(report.files) == 3
