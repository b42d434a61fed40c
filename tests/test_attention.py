"""PyTorch's own attention, which decides in each call by which of its kernels it computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import moved
from torch import Tensor, nn

from graphpeft import LoraConfig, get_peft_model
from graphpeft.testing import laws


class Attending(nn.Module):
    """An attention of a sequence to itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, dropout=0), 2)


def inputs() -> Tensor:
    return torch.randn(4, 9, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows with which the fast path was taken."""
    calls: list[int] = []
    fast: Any = vars(torch)["_native_multi_head_attention"]

    def noting(query: Tensor, *args: Any) -> Any:
        calls.append(len(query))
        return fast(query, *args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", noting)
    return calls


@pytest.mark.parametrize("example_inputs", [None, (inputs(),)], ids=["without-inputs", "with-inputs"])
def test_a_fresh_adapter_takes_the_fast_path_and_gives_the_very_bits(
    example_inputs: Any, fast_calls: list[int]
) -> None:
    base = Attending(batch_first=True).eval().requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["attention"])
    model = get_peft_model(copy.deepcopy(base), config, example_inputs=example_inputs)
    with torch.no_grad():
        assert torch.equal(model(inputs()), base(inputs()))
    assert fast_calls == [4, 4]


def test_rows_with_different_adapters_take_the_fast_path(fast_calls: list[int]) -> None:
    base = Attending(batch_first=True).eval().requires_grad_(False)
    model: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["attention"]))
    with torch.no_grad():
        found = model(inputs(), adapter_names=["default", "__base__", "default", "default"])
        assert fast_calls == [3, 1]
        assert torch.equal(found[[0, 2, 3]], base(inputs()[[0, 2, 3]]))
        assert torch.equal(found[[1]], base(inputs()[[1]]))


@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"batch_first": True, "bias": False}], ids=str)
@pytest.mark.parametrize("target", ["attention", "attention.in_proj_weight", "attention.out_proj"])
def test_a_fresh_adapter_changes_no_output(target: str, options: dict[str, Any]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Attending(**options)

    config = LoraConfig(r=2, target_modules=[target])
    laws.assert_fresh_adapter_changes_no_output(build, config, (inputs(),))


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["self_attn", "linear2"]], ids="+".join)
def test_a_fresh_adapter_in_an_encoder_changes_no_output(targets: list[str]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return encoder()

    laws.assert_fresh_adapter_changes_no_output(build, LoraConfig(r=2, target_modules=targets), (inputs(),))


def test_the_inputs_of_an_example_decide_nothing_for_later_calls() -> None:
    model: Any = Attending(batch_first=True).eval()
    get_peft_model(model, LoraConfig(r=2, target_modules=["attention"]), example_inputs=(inputs(),))
    x, mask = inputs(), torch.arange(9) > torch.tensor([[8], [6], [4], [5]])
    _, weights = model.attention(x, x, x, key_padding_mask=mask)
    assert (weights[3, :, 6:] == 0).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("target", ["linear2", "self_attn", "out_proj", "layers.1.linear1"])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_encoder_is_adapted_on_padded_batches_too(target: str, gradients: bool) -> None:
    base = encoder().eval().requires_grad_(False)
    x, padding = inputs(), torch.arange(9) >= torch.tensor([[9], [5], [7], [9]])
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[target], init_lora_weights=False)
    model: Any = get_peft_model(copy.deepcopy(base), config)

    def found(module: Any) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return module(x, src_key_padding_mask=padding)[~padding]

    expected = found(model)
    assert not torch.allclose(expected, found(base), atol=1e-3)
    for row, length in enumerate((9, 5, 7, 9)):
        alone = model(x[row : row + 1, :length])[0]
        assert torch.allclose(alone, model(x, src_key_padding_mask=padding)[row, :length], atol=1e-5)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(found(copied), expected)
    with model.disable_adapter():
        assert torch.equal(found(model), found(base))
    model.merge_adapter()
    assert torch.allclose(found(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(found(model), expected)
    assert type(model.unload()) is nn.TransformerEncoder
    assert torch.equal(found(model), found(base))


def test_an_encoder_is_told_whether_to_take_nested_tensors_as_before() -> None:
    model: Any = get_peft_model(encoder(), LoraConfig(r=2, target_modules=["linear1"]))
    model.use_nested_tensor = False
    model.unload()
    assert model.use_nested_tensor is False


def test_rows_name_an_adapter_of_an_attention_that_is_not_active() -> None:
    base = nn.Sequential(nn.Linear(48, 48), Attending(batch_first=True))
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False), "p")
    model.add_adapter("q", LoraConfig(r=2, target_modules=["0"]))
    moved(model)
    x, expected = inputs(), []
    for name in ("p", "q"):
        model.set_adapter(name)
        expected.append(model(x))
    found = model(x, adapter_names=["p", "q"] * (len(x) // 2))
    torch.testing.assert_close(found[0::2], expected[0][0::2], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1::2], expected[1][1::2], atol=1e-3, rtol=1e-3)
