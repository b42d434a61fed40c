"""AdaMSS's groups of rows, which follow from the base, and which of them are trained."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from matrix_uses import LAYERS
from models import LLAMA, Experts
from oracle import LINEAR, assert_close, moved, outputs
from torch import nn
from trainers import losses, tokens, trainer_of

import graphpeft
from graphpeft import (
    AdamssConfig,
    AdaptError,
    CheckpointError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    update_and_allocate_callback,
)
from graphpeft.methods.adamss import groups

OPTIONS: dict[str, Any] = {"num_subspaces": 3, "target_modules": ["0"]}
ASA: dict[str, Any] = {
    "num_subspaces": 3,
    "use_asa": True,
    "asa_target_subspaces": 3,
    "init_warmup": 1,
    "final_warmup": 9,
    "mask_interval": 2,
    "init_weights": None,
}


def both(**options: Any) -> tuple[Any, Any]:
    """Returns layers with equal adapters of this library and of PEFT."""
    models = []
    for library, config in ((graphpeft, AdamssConfig), (peft, peft.AdamssConfig)):
        base = LAYERS.build()
        torch.manual_seed(5)
        models.append(library.get_peft_model(base, config(**LAYERS.targets, **options)))  # type: ignore[attr-defined]
    return models[0], models[1]


def train(model: Any, steps: int, begin: int = 0, optimizer: Any = None) -> Any:
    """Trains with an allocation after each step, as PEFT's example does."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    (x,) = LAYERS.inputs()
    allocates = model if hasattr(model, "update_and_allocate") else model.base_model
    for step in range(begin, begin + steps):
        model(x).square().mean().backward()
        optimizer.step()
        allocates.update_and_allocate(step)
        optimizer.zero_grad()
    return optimizer


def trained_names(model: Any) -> set[str]:
    """Returns the trained factors by PEFT's names, without an adapter's."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {re.sub(r"(_[AB])_", r"\1.", re.sub(r"base_model\.model\.|default\.", "", name)) for name in names}


@pytest.mark.parametrize("steps", [2, 3, 5, 9, 12])
def test_fewer_and_fewer_groups_are_trained_as_in_peft(steps: int):
    ours, theirs = both(**ASA)
    for model in (ours, theirs):
        train(model, steps)
    assert trained_names(ours) == trained_names(theirs)
    if steps == 2:
        assert len(trained_names(ours)) == 2 * 9
    if steps >= 9:
        assert len(trained_names(ours)) == 2 * ASA["asa_target_subspaces"]
    expected = peft.get_peft_model_state_dict(theirs)
    for key, value in graphpeft.get_peft_model_state_dict(ours).items():
        assert_close(value, expected[key], 1e-5)


def test_groups_that_rest_go_on_resting_when_adapters_are_switched_and_do_not_move():
    model, _ = both(**ASA)
    optimizer = train(model, 6)
    before = trained_names(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert trained_names(model) == before
    values = {name: value.clone() for name, value in model.named_parameters()}
    train(model, 1, 6, optimizer)
    moved_now = {name for name, value in model.named_parameters() if not torch.equal(value, values[name])}
    assert len(moved_now) == len(before)


def test_a_trainer_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path):
    options: dict[str, Any] = {**ASA, "init_warmup": 0, "mask_interval": 1, "final_warmup": 3}
    config = AdamssConfig(target_modules=["q_proj", "v_proj"], **options)

    def trainer(folder: str) -> tuple[transformers.Trainer, Any]:
        base = LLAMA.build()
        torch.manual_seed(5)
        model: Any = get_peft_model(base, copy.deepcopy(config))
        made = trainer_of(model, tmp_path / folder)
        made.add_callback(update_and_allocate_callback())
        return made, model

    one, first = trainer("one")
    one.train()
    again, second = trainer("again")
    again.train(str(tmp_path / "one" / "checkpoint-2"))
    assert losses(again) == pytest.approx(losses(one), rel=1e-5)
    assert trained_names(second) == trained_names(first)
    assert len(trained_names(first)) < 4 * 2 * 3
    assert tokens().shape == (2, 5)


def test_a_failing_step_changes_nothing():
    model, _ = both(**{**ASA, "asa_target_subspaces": 1, "final_warmup": 2})
    with pytest.raises(AdaptError, match="no factor has a gradient; call update_and_allocate after backward"):
        model.update_and_allocate(1)
    (x,) = LAYERS.inputs()
    model(x).square().mean().backward()
    before = trained_names(model)
    with pytest.raises(AdaptError, match="no group would be trained any longer: of 1"):
        model.update_and_allocate(2)
    assert trained_names(model) == before
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not model.peft_config["default"].training_state()


def test_gradients_that_overflow_do_not_count():
    model, _ = both(**ASA)
    (x,) = LAYERS.inputs()
    model(x).square().mean().backward()
    model.update_and_allocate(1)
    state = model.peft_config["default"].training_state()
    next(p for p in model.parameters() if p.requires_grad).grad.fill_(torch.inf)
    model.update_and_allocate(3)
    after = model.peft_config["default"].training_state()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)


def test_without_the_option_steps_leave_all_groups():
    model, _ = both(num_subspaces=3)
    before = trained_names(model)
    train(model, 3)
    assert trained_names(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_groups_and_directions_are_pefts_beside_half_precision(dtype: torch.dtype):
    theirs: Any = peft.get_peft_model(LINEAR.build().to(dtype), peft.AdamssConfig(**OPTIONS))
    ours: Any = get_peft_model(LINEAR.build().to(dtype), AdamssConfig(**OPTIONS))
    layer, adapter = theirs.base_model.model[0], ours[0].default
    assert torch.equal(adapter.adamss_newB, layer.adamss_newB["default"])
    assert torch.equal(torch.argsort(adapter.adamss_places), layer.scatter_index["default"])


def test_an_adapter_that_comes_beside_a_merged_one_has_the_groups_of_the_base(tmp_path: Path):
    model = moved(get_peft_model(LINEAR.build(), AdamssConfig(**OPTIONS)))
    expected = outputs(model, LINEAR)
    model.save_pretrained(tmp_path)
    other: Any = moved(get_peft_model(LINEAR.build(), LoraConfig(r=2, target_modules=["0"])), seed=5)
    other.merge_adapter()
    other.load_adapter(tmp_path, "loaded")
    other.add_adapter("new", AdamssConfig(**OPTIONS))
    graphpeft.set_peft_model_state_dict(other, graphpeft.get_peft_model_state_dict(model), "new")
    other.unmerge_adapter()
    for name in ("loaded", "new"):
        other.set_adapter(name)
        assert torch.equal(outputs(other, LINEAR), expected)


def test_a_file_of_another_base_is_refused(tmp_path: Path):
    base = nn.Sequential(nn.Linear(6, 8, bias=False))
    options: dict[str, Any] = {"num_subspaces": 2, "target_modules": ["0"]}
    with torch.no_grad():
        # two kinds of rows, as many of each
        base[0].weight[::2] += 3  # type: ignore[operator, index]
    other = copy.deepcopy(base)
    with torch.no_grad():
        # as many in each group as before, so that shapes fit
        other[0].weight.copy_(base[0].weight.roll(1, 1))  # type: ignore[operator, arg-type]
    model: Any = get_peft_model(base, AdamssConfig(**options))
    model.save_pretrained(tmp_path)
    match = "doesn't fit 0: its rows are grouped by the base's weight, and the file's adamss_newB isn't what"
    before = other[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=match):
        PeftModel.from_pretrained(other, tmp_path)
    assert list(other[0]._modules) == []
    assert torch.equal(other[0].weight, before)  # type: ignore[arg-type]
    adapted: Any = moved(get_peft_model(other, AdamssConfig(**options)))
    values = {name: value.clone() for name, value in adapted.named_parameters()}
    with pytest.raises(CheckpointError, match=match):
        graphpeft.set_peft_model_state_dict(adapted, graphpeft.get_peft_model_state_dict(model))
    assert all(torch.equal(value, values[name]) for name, value in adapted.named_parameters())


def test_defaults_are_pefts():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING as THEIRS

    ours = AdamssConfig.default_targets
    assert {kind: names if isinstance(names, str) else list(names) for kind, names in ours.items()} == THEIRS


def test_scikit_learn_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    base = LINEAR.build()
    with pytest.raises(AdaptError, match=r"scikit-learn, which isn't installed; pip install 'graphpeft\[clusters\]'"):
        get_peft_model(base, AdamssConfig(**OPTIONS))
    assert type(base) is nn.Sequential


@pytest.mark.filterwarnings("ignore:no gradient goes through")
def test_what_has_no_groups_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AdaptError, match="it is a stack of matrices, each of which has groups of other sizes"):
        get_peft_model(Experts(), AdamssConfig(target_modules=["up"]))
    with pytest.raises(AdaptError, match="it has none yet; load the model first"):
        get_peft_model(nn.Sequential(nn.Linear(6, 8, device="meta")), AdamssConfig(**OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(groups, "_labels", lambda left, number: torch.zeros(len(left), dtype=torch.int64))
        with pytest.raises(AdaptError, match="its rows are of 1 kinds, and not of num_subspaces=3"):
            get_peft_model(LINEAR.build(), AdamssConfig(**OPTIONS))


@pytest.mark.parametrize("records", [False, True])
def test_a_bias_is_changed_too_where_an_encoder_reads_it(records: bool):
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    before = encoder(x)
    adapted = moved(get_peft_model(encoder, AdamssConfig(target_modules=["linear1"])))
    with torch.set_grad_enabled(records):
        found = adapted(x)
        assert not torch.allclose(found, before)
        torch.testing.assert_close(adapted.merge_and_unload()(x), found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"init_weights": True}, "choose 'orthogonal' or None"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval is 0; with use_asa, it must be positive"),
        ({"use_asa": True, "asa_target_subspaces": 0}, "asa_target_subspaces is 0"),
        ({"use_asa": True, "asa_schedule_exponent": 0.0}, "asa_schedule_exponent is 0"),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "leave no steps"),
        ({"num_subspaces": 0}, "num_subspaces must be"),
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        AdamssConfig(**options)


def test_no_option_is_checked_that_is_not_used():
    assert AdamssConfig(mask_interval=0, init_weights=False).init_weights is None


def test_each_weight_is_decomposed_once_and_what_was_found_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: list[torch.Size] = []
    by_seed = groups.svd_by_seed

    def counted(weight: torch.Tensor, *options: int) -> tuple[torch.Tensor, ...]:
        seen.append(weight.shape)
        return by_seed(weight, *options)

    monkeypatch.setattr(groups, "svd_by_seed", counted)
    config = AdamssConfig(**OPTIONS)
    model: Any = get_peft_model(LINEAR.build(), config)
    assert len(seen) == 1
    assert not model.peft_config["default"]._directions
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(LINEAR.build(), tmp_path)
    assert len(seen) == 2
    model.add_adapter("second", config)
    assert len(seen) == 3
