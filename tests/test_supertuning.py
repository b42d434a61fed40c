"""Super-Tuning: which elements are trained, files without their places, and options that contradict each other."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from oracle import LINEAR, moved
from safetensors.torch import load_file

from graphpeft import AdaptError, PeftModel, SupertuningConfig, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")


@pytest.mark.parametrize("top", [True, False], ids=["largest", "smallest"])
def test_the_largest_or_the_smallest_elements_are_trained(top: bool):
    base: Any = LINEAR.build()
    model = moved(
        get_peft_model(LINEAR.build(), SupertuningConfig(sparsity=0.75, select_top=top, target_modules=["0"]))
    )
    changed = model.merge_and_unload()[0].weight != base[0].weight
    sizes = base[0].weight.detach().abs()
    assert changed.sum() == 12
    chosen, others = sizes[changed], sizes[~changed]
    assert chosen.min() > others.max() if top else chosen.max() < others.min()


def test_places_that_files_lack_are_chosen_anew_as_in_peft(tmp_path: Any):
    options: dict[str, Any] = {"sparsity": 0.8, "save_precomputed_indices": False, "target_modules": ["0"]}
    theirs = moved(peft.get_peft_model(LINEAR.build(), peft.SupertuningConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = PeftModel.from_pretrained(LINEAR.build(), tmp_path / "theirs")
    expected = theirs(*LINEAR.inputs())
    torch.testing.assert_close(ours(*LINEAR.inputs()), expected)
    ours.save_pretrained(tmp_path / "ours")
    assert list(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == ["base_model.model.0.supertuning_values"]
    again = peft.PeftModel.from_pretrained(LINEAR.build(), str(tmp_path / "ours"))
    torch.testing.assert_close(again(*LINEAR.inputs()), expected)


def test_places_that_files_lack_are_those_of_the_base_where_others_are_merged(tmp_path: Any):
    config = SupertuningConfig(sparsity=0.8, save_precomputed_indices=False, target_modules=["0"])
    saved = moved(get_peft_model(LINEAR.build(), config))
    saved.save_pretrained(tmp_path)
    model: Any = get_peft_model(
        LINEAR.build(), SupertuningConfig(sparsity=0.2, target_modules=["0"], init_weights=False)
    )
    model.merge_adapter()
    model.load_adapter(tmp_path, "second")
    model.unmerge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(model(*LINEAR.inputs()), saved(*LINEAR.inputs()))


def test_that_files_lack_places_is_warned_of():
    with pytest.warns(UserWarning, match="the places are chosen anew by the base's weights"):
        SupertuningConfig(save_precomputed_indices=False)


def test_alpha_is_twice_the_rank_unless_it_is_set():
    assert SupertuningConfig(r=3).lora_alpha == 6
    assert SupertuningConfig(r=3, lora_alpha=4).lora_alpha == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_alpha": 3}, "lora_alpha is the scale of a product of rank r, and r is None"),
        ({"sparsity": 1.0}, "sparsity must be a number from 0 on, and below 1"),
        ({"sparsity": -0.1}, "sparsity must be a number from 0 on, and below 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number from 0 on, and below 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        SupertuningConfig(**options)


def test_a_sparsity_that_leaves_no_element_is_refused():
    with pytest.raises(AdaptError, match=r"sparsity=0\.99 leaves none of the 48 elements of its weight; lower it"):
        get_peft_model(LINEAR.build(), SupertuningConfig(target_modules=["0"]))
