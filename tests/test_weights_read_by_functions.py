"""Weights that a forward hands to a function, which never calls the layer: the adapter changes what is handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import silu
from torchvision.models.swin_transformer import SwinTransformer
from transformers.models.mamba import modeling_mamba

import graphpeft
from graphpeft import LoraConfig, get_peft_model, trace


class Reader(NamedTuple):
    """A model that reads the weights of some of its layers.

    Attributes:
        name: Of the test.
        build: Makes the model.
        inputs: What it is called with.
        targets: The layers: some that it calls, and some whose weights it reads.
        read: Those of the targets that it doesn't call, at least in one mode.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: list[str]
    read: list[str]


def _swin() -> nn.Module:
    """A Swin whose attention is one function of torchvision, ``shifted_window_attention``."""
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5)


def _mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2, conv_kernel=3, use_cache=False
    )
    return transformers.MambaForCausalLM(config)


READERS = [
    Reader("swin", _swin, lambda: {"x": torch.randn(2, 3, 32, 32)}, ["qkv", "proj"], ["qkv", "proj"]),
    Reader(
        "mamba",
        _mamba,
        lambda: {"input_ids": torch.randint(64, (2, 9))},
        ["in_proj", "x_proj", "dt_proj", "out_proj"],
        ["dt_proj"],
    ),
]


def _output(model: Any, inputs: dict[str, Any]) -> Tensor:
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def _adapted(reader: Reader, is_traced: bool, is_training: bool) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Returns the base model, its adapted copy with factors that have an effect, and inputs."""
    torch.manual_seed(0)
    base, inputs = reader.build().train(is_training), reader.inputs()
    model = reader.build().train(is_training)
    model.load_state_dict(base.state_dict())
    if is_traced:
        model = trace(model, inputs)
    config = LoraConfig(target_modules=reader.targets, r=2, lora_alpha=4, init_lora_weights=False)
    return base, get_peft_model(model, config), inputs


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def _changed_weights(model: nn.Module, scaling: float) -> dict[str, Tensor]:
    """Returns W + s·BA (LoRA, arXiv 2106.09685) of each adapted layer, by the names of the base model."""
    found = _factors(model)
    changed = {}
    for name, a in found.items():
        if "lora_A" in name:
            path = name.removesuffix(".default.lora_A")
            weight = model.get_parameter(f"{path}.weight")
            changed[f"{path}.weight"] = weight + scaling * found[name.replace("lora_A", "lora_B")] @ a
    return changed


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("is_traced", [False, True], ids=["modules", "traced"])
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_outputs_and_gradients_are_those_of_the_changed_weights(reader: Reader, is_traced: bool, is_training: bool):
    base, model, inputs = _adapted(reader, is_traced, is_training)
    found = _output(model, inputs)
    expected = functional_call(base, _changed_weights(model, scaling=2.0), args=(), kwargs=inputs, tie_weights=True)
    expected = expected if isinstance(expected, Tensor) else expected[0]
    assert not torch.allclose(found, _output(base, inputs), atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    factors = _factors(model)
    ours = torch.autograd.grad(found.square().mean(), [*factors.values()])
    theirs = torch.autograd.grad(expected.square().mean(), [*factors.values()])
    for name, gradient, other in zip(factors, ours, theirs, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_pefts_branch_has_no_effect_there(reader: Reader):
    base: Any = reader.build().eval()
    inputs = reader.inputs()
    expected = _output(base, inputs)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=reader.read, init_lora_weights=False))
    assert torch.equal(_output(model, inputs), expected)


def _fused(states: Tensor, conv: Tensor, conv_bias: Any, x: Tensor, dt: Tensor, out: Tensor, *rest: Any, **more: Any):
    """A kernel that takes the weights of a whole mixer, as ``mamba_inner_fn`` does on a GPU (not its formula)."""
    return _Kernel.apply(states, x, dt, out)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, x: Tensor, dt: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(states, x, dt, out)
        return _mixed(states, x, dt, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return torch.autograd.grad(_mixed(*given), given, grads)


def _mixed(states: Tensor, x: Tensor, dt: Tensor, out: Tensor) -> Tensor:
    inner, gate = states.transpose(1, 2).chunk(2, dim=-1)
    step = (inner @ x.T)[..., : dt.shape[1]] @ dt.T
    return (inner * step * silu(gate)) @ out.T


@pytest.mark.parametrize("is_traced", [False, True], ids=["modules", "traced"])
def test_a_fused_kernel_of_a_mixer_gets_changed_weights(monkeypatch: pytest.MonkeyPatch, is_traced: bool):
    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", _fused)
    test_outputs_and_gradients_are_those_of_the_changed_weights(READERS[1], is_traced, is_training=True)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_it_is_saved_loaded_and_merged(reader: Reader, tmp_path: Any):
    base, model, inputs = _adapted(reader, is_traced=False, is_training=False)
    expected = _output(model, inputs)
    model.save_pretrained(str(tmp_path))
    loaded = graphpeft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(_output(loaded, inputs), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_output(loaded.merge_and_unload(), inputs), expected, atol=1e-5, rtol=1e-5)
