"""State dicts of adapted modules whose classes save and load their own tensors by themselves."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model


class SavesItsOwn(nn.Module):
    """As the layers of PyTorch Geometric, it names the tensors that it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class LoadsItsOwn(SavesItsOwn):
    """It names those that it loads, too, under other names, and wants no others."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "w"] = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "b"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + "w": self.weight, prefix + "b": self.bias}
        missing_keys += [key for key in own if key not in state_dict]
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in own]
        with torch.no_grad():
            for key in own.keys() & state_dict.keys():
                own[key].copy_(state_dict[key])


def of_geometric() -> nn.Module:
    return pytest.importorskip("torch_geometric.nn").Linear(4, 5)


# its method that draws first values reads the weight, too
pytestmark = pytest.mark.filterwarnings("ignore:Linear.initialize_parameters uses weight")

LAYERS = [
    pytest.param(SavesItsOwn, id="saves its own"),
    pytest.param(LoadsItsOwn, id="loads its own"),
    pytest.param(of_geometric, id="PyTorch Geometric"),
]


def adapted(make: Any, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(make(), nn.Tanh(), nn.Linear(5, 3))
    config = LoraConfig(
        r=2, lora_alpha=3, target_parameters=["0.weight"], target_modules=["2"], init_lora_weights=False, **options
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_has_what_adapters_have_and_gives_it_back(make: Any, assign: bool) -> None:
    model, x = adapted(make, 1), torch.randn(3, 4)
    model.add_adapter("second", LoraConfig(r=3, target_parameters=["0.weight"], init_lora_weights=False))
    saved = model.state_dict()
    assert {f"0.{name}.lora_{factor}" for factor in "AB" for name in ("default", "second")} <= {
        key.replace("weight_lora", "lora") for key in saved
    }
    other = adapted(make, 2)
    other.add_adapter("second", LoraConfig(r=3, target_parameters=["0.weight"], init_lora_weights=False))
    assert not torch.equal(other(x), model(x))
    result = other.load_state_dict(copy.deepcopy(saved), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name in ("default", "second"):
        model.set_adapter(name)
        other.set_adapter(name)
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("make", LAYERS)
def test_what_is_missing_or_doesnt_fit_is_told_once(make: Any) -> None:
    model = adapted(make, 1)
    saved = model.state_dict()
    [a] = [key for key in saved if "0." in key and "lora_A" in key]
    [b] = [key for key in saved if "0." in key and "lora_B" in key]
    saved[b] = torch.randn(7, 7)
    value = saved.pop(a)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(saved, strict=True)
    assert str(caught.value).count(a) == 1
    assert str(caught.value).count(b) == 1
    saved[b] = model.state_dict()[b]
    assert model.load_state_dict(saved, strict=False).missing_keys in ([], [a])
    assert torch.equal(model.state_dict()[a], value)


@pytest.mark.parametrize("make", LAYERS)
def test_a_tensor_that_is_fully_trained_is_saved_beside_the_models_own(make: Any) -> None:
    model = adapted(make, 1, bias="all")
    own = model[0]._parameters["bias"].detach().clone()
    with torch.no_grad():
        model[0].default.bias.add_(1)
    saved = model.state_dict()
    key = "0.b" if "0.b" in saved else "0.bias"
    assert torch.equal(saved[key], own)
    assert torch.equal(saved["0.default.bias"], own + 1)


@pytest.mark.parametrize("make", LAYERS)
def test_it_goes_with_copies_and_with_the_last_adapter(make: Any) -> None:
    model = adapted(make, 1)
    cls, expected = type(make()), model.state_dict()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        found = other.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    model.set_adapter([])
    assert list(model.state_dict()) == list(expected)
    model.unload()
    assert type(model[0]) is cls
    assert not any("lora" in key for key in model.state_dict())
