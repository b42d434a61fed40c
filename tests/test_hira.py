"""HiRA with several ranks, with its first values, and on weights that PEFT doesn't adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import LinearNF4
from models import LLAMA, Experts, call, result
from oracle import Case, assert_close, assert_same_tensors, moved, outputs
from quantised import by_bitsandbytes
from torch import nn

import graphpeft
from graphpeft import AdaptError, HiraConfig, get_peft_model
from graphpeft.sites import quantisers

pytestmark = pytest.mark.filterwarnings("ignore:no gradient goes through")


def by_both(build: Any, **options: Any) -> tuple[Any, Any]:
    """Returns two copies of a model, adapted by PEFT and by this library, with equal values."""
    theirs = moved(peft.get_peft_model(build(), peft.HiraConfig(**options)))
    ours: Any = get_peft_model(build(), HiraConfig(**options))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours.eval()


def test_patterns_give_layers_of_the_default_targets_other_ranks_in_any_order(tmp_path: Path):
    # PEFT sorts the keys of its files, where another of them matches first
    patterns = {"q_proj": 3, "1.self_attn.q_proj": 5, "layers.0.self_attn.v_proj": 1}
    model: Any = moved(get_peft_model(LLAMA.build(), HiraConfig(r=2, rank_pattern=patterns)))
    ranks = [len(tensor) for name, tensor in model.named_parameters() if name.endswith("hira_A")]
    assert ranks == [3, 1, 3, 2]
    model.save_pretrained(tmp_path)
    loaded = graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert torch.equal(result(call(loaded, LLAMA.inputs())), result(call(model, LLAMA.inputs())))


def test_a_file_of_pefts_that_ignores_its_pattern_is_read_or_says_so(tmp_path: Path):
    for rank, folder in ((4, tmp_path / "more"), (1, tmp_path / "less")):
        config = peft.HiraConfig(r=2, rank_pattern={"q_proj": rank})
        theirs = moved(peft.get_peft_model(LLAMA.build(), config))
        theirs.save_pretrained(str(folder))
    ours: Any = graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "more")
    assert len(ours.get_submodule("model.layers.0.self_attn.q_proj").default.hira_A) == 4
    assert_close(result(call(ours, LLAMA.inputs())), result(call(theirs, LLAMA.inputs())), 1e-5)
    with pytest.raises(graphpeft.CheckpointError, match="rank 2, where rank_pattern says 1, which PEFT ignores"):
        graphpeft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "less")


@pytest.mark.parametrize("init_weights", [True, False, "gaussian", None])
def test_first_values_of_a_table_and_a_matrix_are_pefts_whatever_is_asked_for(init_weights: Any):
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))

    models = []
    for library, config in ((peft, peft.HiraConfig), (graphpeft, HiraConfig)):
        base = build()
        torch.manual_seed(3)
        made = config(r=2, init_weights=init_weights, target_modules=["0", "1"])  # type: ignore[operator]
        models.append(library.get_peft_model(base, made))  # type: ignore[attr-defined]
    assert_same_tensors(models[1], models[0])


def test_each_matrix_of_a_stack_has_a_product_of_its_own():
    config = HiraConfig(r=2, target_modules=["up"])
    assert get_peft_model(Experts(), config).default.up_hira_B.shape == (2, 6, 2)


@pytest.mark.filterwarnings("ignore:adapters are merged into the quantised weights")
def test_the_numbers_of_a_quantised_weight_are_multiplied_as_in_peft():
    def build() -> Any:
        model: Any = case.build()
        model.is_loaded_in_4bit = True  # by which PEFT tells such a model
        return model

    case = Case("nf4", by_bitsandbytes(LinearNF4), lambda: (torch.randn(3, 64),))
    theirs, ours = by_both(build, r=2, hira_dropout=0.3, target_modules=["0", "2"])
    active = outputs(ours, case)
    assert_close(active, outputs(theirs, case), 1e-5)
    assert_close(outputs(ours.train(), case), outputs(theirs.train(), case), 1e-5)
    codes = quantisers.codes_of(case.build().get_submodule("0")).numbers()
    adapter = ours[0].default
    expected = codes + codes * (adapter.hira_B @ adapter.hira_A).detach()
    ours.eval().merge_adapter()
    merged = quantisers.codes_of(ours[0]).numbers()
    torch.testing.assert_close(merged, quantisers.quantised(ours[0], expected).numbers())
    ours.unmerge_adapter()
    assert torch.equal(outputs(ours, case), active)


def test_dropout_of_indices_is_refused():
    with pytest.raises(AdaptError, match="dropout drops elements of an operation's input, and the use of its weight"):
        get_peft_model(nn.Sequential(nn.Embedding(9, 6)), HiraConfig(r=2, hira_dropout=0.1, target_modules=["0"]))
