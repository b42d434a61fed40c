"""LN tuning: PEFT's defaults and numbers in training, what is refused, and adapters beside each other.

The contract with PEFT's files and names is in `test_methods_fully_trained.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import BERT, GPT2, LLAMA, T5, Example, call, output, result
from oracle import perturb
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    LNTuningConfig,
    PeftModel,
    explain,
    get_peft_model,
    inject_adapter_in_model,
)

# what PEFT warns of is PEFT's
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:Setting `save_embedding_layers`")

HALF = torch.bfloat16


def trained(model: Any) -> set[int]:
    return {parameter.numel() for parameter in model.parameters() if parameter.requires_grad}


def test_the_default_targets_are_pefts() -> None:
    theirs = TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
    assert {kind: list(names) for kind, names in LNTuningConfig.default_targets.items()} == theirs


@pytest.mark.parametrize("example", [LLAMA, GPT2, T5], ids=str)
def test_defaults_train_the_norms_that_pefts_do(example: Example) -> None:
    ours: Any = get_peft_model(example.build(), LNTuningConfig())
    theirs: Any = peft.get_peft_model(example.build(), peft.LNTuningConfig())
    perturb(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert graphpeft.get_peft_model_state_dict(ours).keys() == state.keys()
    graphpeft.set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(output(ours, example.inputs()), output(theirs.eval(), example.inputs()))


def test_a_model_without_a_default_is_refused() -> None:
    with pytest.raises(AdaptError, match="target_modules"):
        get_peft_model(BERT.build(), LNTuningConfig())


class Normed(nn.Module):
    """A norm that counts in its buffers what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def test_what_a_norm_has_seen_in_training_is_its_copys_as_in_peft() -> None:
    torch.manual_seed(0)
    base, x = Normed(), 3 + 2 * torch.randn(8, 4)
    found = []
    for library in (peft, graphpeft):
        model: Any = library.get_peft_model(copy.deepcopy(base), library.LNTuningConfig(target_modules=["norm"]))
        model.train()(x)
        outputs = [model.eval()(x)]
        with model.disable_adapter():
            outputs.append(model(x))
        found.append([*library.get_peft_model_state_dict(model).values(), *outputs])
    assert len(found[1]) == 7
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)
    assert torch.equal(found[1][-1], base.eval()(x))


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}], ids=["alone", "beside modules_to_save"])
def test_copies_have_the_dtype_of_the_base_as_in_peft(more: dict[str, Any]) -> None:
    for library in (peft, graphpeft):
        model: Any = library.get_peft_model(LLAMA.build().to(HALF), library.LNTuningConfig(**more))
        assert {tensor.dtype for tensor in library.get_peft_model_state_dict(model).values()} == {HALF}
    perturb(model)
    assert output(model, LLAMA.inputs()).dtype == HALF


def test_merged_is_active_bit_for_bit_and_can_be_taken_back() -> None:
    model: Any = get_peft_model(LLAMA.build(), LNTuningConfig())
    perturb(model)
    active, inputs = output(model, LLAMA.inputs()), LLAMA.inputs()
    model.merge_adapter()
    assert torch.equal(output(model, inputs), active)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), active)
    assert torch.equal(output(model.merge_and_unload(), inputs), active)


def test_one_of_two_acts_and_rows_of_a_batch_have_one_each() -> None:
    model: Any = get_peft_model(LLAMA.build(), LNTuningConfig(target_modules=["norm"]))
    model.add_adapter("all", LNTuningConfig())
    perturb(model)
    inputs, names = LLAMA.inputs(), ["default", "all"]
    found = result(call(model, {**inputs, "adapter_names": names}))
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], output(model, inputs)[row])
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(LLAMA.build(), inputs))


def test_tied_tables_that_are_both_named_have_a_copy_each_as_in_peft() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    torch.manual_seed(0)
    base, tokens = Tied(), torch.tensor([[1, 4, 8]])
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LNTuningConfig(target_modules=["embed", "head"]))
    ours: Any = get_peft_model(copy.deepcopy(base), LNTuningConfig(target_modules=["embed", "head"]))
    perturb(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert not torch.equal(*list(state.values()))
    graphpeft.set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


def test_all_linear_names_what_it_does_in_peft() -> None:
    states = []
    for library in (peft, graphpeft):
        model: Any = library.get_peft_model(LLAMA.build(), library.LNTuningConfig(target_modules="all-linear"))
        states.append(set(library.get_peft_model_state_dict(model)))
    assert states[0] == states[1]
    assert len(states[0]) == 14


def test_names_of_tensors_choose_the_modules_as_in_peft() -> None:
    names = dict.fromkeys(["model.norm.ln_tuning_layers.weight"])
    model = inject_adapter_in_model(LNTuningConfig(), LLAMA.build(), state_dict=names)
    assert list(graphpeft.get_peft_model_state_dict(model)) == ["base_model.model.model.norm.ln_tuning_layers.weight"]


def test_where_is_refused_since_there_are_no_sites_to_choose_from() -> None:
    model = LLAMA.build()
    with pytest.raises(AdaptError, match="where chooses among sites, and LN_TUNING has none here"):
        get_peft_model(model, LNTuningConfig(), where=lambda site: False)
    assert not hasattr(model, "peft_config")


def test_copies_are_not_combined() -> None:
    model: Any = get_peft_model(LLAMA.build(), LNTuningConfig())
    model.add_adapter("second", LNTuningConfig())
    with pytest.raises(AdaptError, match="copies of a tensor can't be combined"):
        model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum")


def test_the_report_says_which_tensors_are_trained() -> None:
    report = explain(LLAMA.build(), LNTuningConfig(target_modules=["norm"]))
    assert str(report) == (
        "LN_TUNING adapter 'default', which trains tensors of the model\n\nfully trained: model.norm.weight"
    )


def test_a_file_of_pefts_for_a_head_is_loaded(tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(LLAMA.build(), peft.LNTuningConfig(target_modules=["lm_head"])).eval()
    perturb(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    torch.testing.assert_close(output(ours, LLAMA.inputs()), output(theirs, LLAMA.inputs()))
