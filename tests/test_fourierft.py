"""FourierFT: where the coefficients are, and how many a weight can have."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from oracle import LINEAR
from torch import nn

from graphpeft import AdaptError, FourierFTConfig, get_peft_model, get_peft_model_state_dict


def test_the_change_is_the_transform_of_its_coefficients():
    model: Any = get_peft_model(LINEAR.build(), FourierFTConfig(n_frequency=5, scaling=2.0, target_modules=["0"]))
    adapter, base = model[0].default, LINEAR.build()
    dense = torch.zeros(48).index_put((adapter.fourierft_places,), adapter.fourierft_spectrum.detach()).view(8, 6)
    change = model.merge_and_unload()[0].weight - base[0].weight  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(change, 2 * torch.fft.ifft2(dense).real)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({r"c\.0": 3}, [9, 9, 3]),
        ({"0": 3}, [9, 3, 3]),
        ({"a": 4, "b.0": 5, "0": 6}, [4, 6, 6]),
        ({"b.0": 5}, [9, 5, 9]),
        ({"(c|b).*0": 3}, [9, 9, 3]),
        ({"a|b": 3}, [9, 9, 9]),
    ],
)
def test_patterns_have_the_meaning_that_they_have_in_peft(patterns: dict[str, int], expected: list[int]):
    def build() -> nn.Module:
        inside = nn.ModuleDict({"c": nn.ModuleList([nn.Linear(4, 4)])})
        return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4)]), "inner": inside})

    options: dict[str, Any] = {"n_frequency": 9, "n_frequency_pattern": patterns, "target_modules": ["a", "0"]}
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(build(), peft.FourierFTConfig(**options)))
    ours = get_peft_model_state_dict(get_peft_model(build(), FourierFTConfig(**options)))
    sizes = {key: len(tensor) for key, tensor in theirs.items()}
    assert {key: len(tensor) for key, tensor in ours.items()} == sizes
    keys = [f"base_model.model.{name}.fourierft_spectrum" for name in ("a", "b.0", "inner.c.0")]
    assert [sizes[key] for key in keys] == expected


def test_more_coefficients_than_elements_are_refused():
    with pytest.raises(AdaptError, match="n_frequency=49 is more than the 48 elements of its weight, 8×6"):
        get_peft_model(LINEAR.build(), FourierFTConfig(n_frequency=49, target_modules=["0"]))


def test_a_vector_is_refused():
    with pytest.raises(AdaptError, match=r"its weight of shape \(6,\) is no matrix"):
        get_peft_model(nn.Sequential(nn.LayerNorm(6)), FourierFTConfig(n_frequency=3, target_modules=["0"]))
