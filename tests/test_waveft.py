"""WaveFT: the wavelets that there are, coefficients in proportion to sizes, and what can't be."""

from __future__ import annotations

import importlib.util
from typing import Any

import peft
import pytest
import torch
from oracle import LINEAR, moved
from peft.tuners.waveft.wavelet import Wavelet
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, WaveFTConfig, get_peft_model
from graphpeft.methods.wavelets import filters_of

PEFTS = ["db1", *(f"{family}{n}" for family in ("db", "sym") for n in range(2, 11)), "coif1", "coif2", "coif3"]
"""The wavelets for which PEFT has the filters."""


def by_both(base: Any, **options: Any) -> tuple[Any, Any]:
    """Returns a model adapted by PEFT and by this library, with equal values."""
    given: dict[str, Any] = {"n_frequency": 11, "scaling": 5.0, "target_modules": ["0"], **options}
    theirs = moved(peft.get_peft_model(base(), peft.WaveFTConfig(**given)))
    ours: Any = get_peft_model(base(), WaveFTConfig(**given))
    graphpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


@pytest.mark.parametrize("wavelet", PEFTS)
def test_filters_and_changes_are_pefts(wavelet: str):
    if wavelet != "db1":
        pytest.importorskip("pywt")
    expected = Wavelet(wavelet)
    torch.testing.assert_close(torch.tensor(filters_of(wavelet)), torch.tensor([expected.rec_lo, expected.rec_hi]))
    theirs, ours = by_both(LINEAR.build, wavelet_family=wavelet)
    torch.testing.assert_close(ours(*LINEAR.inputs()), theirs(*LINEAR.inputs()))


class Layers(nn.Module):
    """Layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


@pytest.mark.parametrize("options", [{"proportional_parameters": True}, {"n_frequency_pattern": {"b": 30}}], ids=str)
def test_layers_have_as_many_coefficients_as_in_peft(options: dict[str, Any], tmp_path: Any):
    theirs, ours = by_both(layers, target_modules=["a", "b", "c"], **options)
    (x,) = LINEAR.inputs()
    torch.testing.assert_close(ours(x), theirs(x))
    sizes = [getattr(ours, name).default.waveft_spectrum.numel() for name in "abc"]
    assert sizes == ([6, 21, 5] if "proportional_parameters" in options else [11, 30, 11])
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(layers(), str(tmp_path)).eval()
    torch.testing.assert_close(again(x), ours(x))
    torch.testing.assert_close(graphpeft.PeftModel.from_pretrained(layers(), tmp_path)(x), ours(x))


def test_a_wavelet_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AdaptError, match=r"'sym3' come from PyWavelets.*pip install 'graphpeft\[wavelets\]'"):
        get_peft_model(LINEAR.build(), WaveFTConfig(n_frequency=3, wavelet_family="sym3", target_modules=["0"]))
    get_peft_model(LINEAR.build(), WaveFTConfig(n_frequency=3, target_modules=["0"]))


@pytest.mark.parametrize("wavelet", ["coif4", "coif5"])
def test_a_wavelet_of_which_pefts_numbers_are_no_filter_is_refused(wavelet: str):
    with pytest.raises(ValueError, match=f"'{wavelet}' is refused, since PEFT's numbers for it aren't its filters"):
        WaveFTConfig(wavelet_family=wavelet)
    taps = torch.tensor(Wavelet(wavelet).rec_lo, dtype=torch.float64)
    shifted = [(taps[2 * n :] * taps[: len(taps) - 2 * n]).sum() for n in range(1, 4)]
    # those of a wavelet are orthogonal to themselves, moved by an even number
    assert max(abs(product) for product in shifted) > 1e-3


@pytest.mark.parametrize("wavelet", ["haar2", "db0", "db39", "sym1", "sym21", "coif18", ""])
def test_an_unknown_wavelet_is_refused(wavelet: str):
    with pytest.raises(ValueError, match="wavelet_family must be one of db1 to db38, sym2 to sym20, coif1 to coif17"):
        WaveFTConfig(wavelet_family=wavelet)


def test_more_coefficients_than_elements_are_refused():
    with pytest.raises(AdaptError, match="n_frequency=49 is more than the 48 elements of its weight, 8×6"):
        get_peft_model(LINEAR.build(), WaveFTConfig(n_frequency=49, target_modules=["0"]))
