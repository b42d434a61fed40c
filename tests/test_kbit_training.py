"""Preparing quantised models for training, and LoftQ on them, are PEFT's; a wrong call changes nothing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, LinearNF4
from measuring import let_peft_round_on_the_cpu
from models import LLAMA, call
from oracle import Case, assert_close, by_us, config, peft_config, tensors
from quantised import by_bitsandbytes
from safetensors.torch import save_file
from torch import nn

from graphpeft import (
    AdaptError,
    CheckpointError,
    LoraConfig,
    cast_mixed_precision_params,
    get_peft_model,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
)
from graphpeft.testing import laws

pytestmark = pytest.mark.filterwarnings("ignore:::peft")


def marked(**marks: Any) -> Any:
    """Returns a Llama in half precision, with the marks that Transformers gives to a quantised model."""
    model: Any = LLAMA.build().to(torch.bfloat16)
    for name, value in marks.items():
        setattr(model, name, value)
    return model


def state_of(model: Any) -> dict[str, Any]:
    """Returns what preparing changes."""
    parameters = {name: (p.dtype, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    embeddings = model.get_input_embeddings()
    hooks = len(embeddings._forward_hooks)
    return {"parameters": parameters, "hooks": hooks, "checkpoints": model.is_gradient_checkpointing}


@pytest.mark.parametrize(
    "marks",
    [
        {},
        {"is_loaded_in_4bit": True},
        {"is_loaded_in_8bit": True},
        {"quantization_method": "torchao"},
        {"quantization_method": "gptq"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}],
    ids=str,
)
def test_a_prepared_model_is_pefts(marks: dict[str, Any], options: dict[str, Any]) -> None:
    ours = state_of(prepare_model_for_kbit_training(marked(**marks), **options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")
        theirs = state_of(peft.prepare_model_for_kbit_training(marked(**marks), **options))
    assert ours["hooks"] == theirs["hooks"]
    assert ours["checkpoints"] == theirs["checkpoints"]
    assert ours["parameters"].keys() == theirs["parameters"].keys()
    for name, (dtype, requires_grad, values) in ours["parameters"].items():
        assert (dtype, requires_grad) == theirs["parameters"][name][:2]
        assert torch.equal(values, theirs["parameters"][name][2])


def test_a_prepared_model_trains_under_checkpoints() -> None:
    model = prepare_model_for_kbit_training(marked(is_loaded_in_4bit=True))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    call(adapted, LLAMA.inputs()).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_codes_are_not_cast() -> None:
    model: Any = nn.Sequential(LinearNF4(64, 64, quant_storage=torch.bfloat16), nn.LayerNorm(64).bfloat16()).to("cpu")
    codes = model[0].weight.data.clone().view(torch.uint8)
    prepare_model_for_kbit_training(model)
    assert torch.equal(model[0].weight.data.view(torch.uint8), codes)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].weight.dtype == torch.float32


def test_an_adapted_model_is_refused_and_so_is_one_that_cannot_checkpoint() -> None:
    adapted = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    own: Any = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    own.is_loaded_in_4bit = True
    for model, reason in ((adapted, "call it before get_peft_model"), (own, "has no gradient_checkpointing_enable")):
        before = laws.snapshot(model)
        with pytest.raises(AdaptError, match=reason):
            prepare_model_for_kbit_training(model)
        laws.require_unchanged(model, before, "a refused preparation")


def test_mixed_precision_gives_the_dtypes_of_peft_and_trains_under_autocast() -> None:
    ours, theirs = get_peft_model(LLAMA.build(), config(LLAMA)), peft.get_peft_model(LLAMA.build(), peft_config(LLAMA))
    cast_mixed_precision_params(ours, torch.bfloat16)
    peft.utils.other.cast_mixed_precision_params(theirs, torch.bfloat16)
    of_ours, of_theirs = ([p.dtype for p in model.parameters() if p.requires_grad] for model in (ours, theirs))
    assert set(of_ours) == set(of_theirs) == {torch.float32}
    of_base = [{p.dtype for p in model.parameters() if not p.requires_grad} for model in (ours, theirs)]
    assert of_base == [{torch.bfloat16}] * 2
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(ours, LLAMA.inputs()).logits.float().square().mean()
    loss.backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_mixed_precision_leaves_codes_as_they_are_and_refuses_other_dtypes() -> None:
    model = get_peft_model(by_bitsandbytes(LinearNF4)(), LoraConfig(target_modules=["0"]))
    x = torch.randn(2, 64)
    expected = model(x)
    before = laws.snapshot(model)
    for wrong in (torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match="is no floating-point dtype; pass torch"):
            cast_mixed_precision_params(model, wrong)  # type: ignore[arg-type]
    laws.require_unchanged(model, before, "a refused cast")
    cast_mixed_precision_params(model, torch.bfloat16)
    assert_close(model(x), expected, 1e-2)


@pytest.mark.parametrize("cls", [Linear4bit, LinearNF4, Linear8bitLt])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_numbers_are_counted_as_in_peft(cls: Any, storage: torch.dtype) -> None:
    options: dict[str, Any] = {"has_fp16_weights": False} if cls is Linear8bitLt else {"quant_storage": storage}
    case = Case("counted", by_bitsandbytes(cls, **options), tuple)
    theirs = peft.get_peft_model(case.build(), peft_config(case))
    assert by_us(case).get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert by_us(case).get_nb_trainable_parameters()[1] == 2 * (64 * 64 + 64) + 2 * 2 * 64


# LoftQ

NF4 = Case("nf4", by_bitsandbytes(LinearNF4), lambda: (torch.randn(3, 64),), {"target_modules": ["0", "2"]})


def quantised_from(plain: nn.Module, folder: Path, **names: str) -> Any:
    """Returns a model of 4 bits with the weights of `plain`, which are saved in the folder."""
    state = plain.state_dict()
    save_file({names.get(name, name): tensor for name, tensor in state.items()}, folder / "model.safetensors")
    model = nn.Sequential(LinearNF4(64, 64), nn.Tanh(), LinearNF4(64, 64))
    model.load_state_dict(state)
    return model.to("cpu")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def test_loftqs_values_are_pefts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_peft_round_on_the_cpu(monkeypatch)
    base = quantised_from(plain(), tmp_path)
    theirs = copy.deepcopy(base)
    theirs.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(theirs, peft_config(NF4))
    whole = torch.Tensor.to
    # it computes on a GPU alone
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: whole(self, *a, **{n: v for n, v in k.items() if v != "cuda"})
    )
    peft.replace_lora_weights_loftq(theirs, str(tmp_path))
    monkeypatch.undo()
    ours = get_peft_model(base, config(NF4))
    before = ours(torch.ones(1, 64))
    replace_lora_weights_loftq(ours, tmp_path)
    for name, tensor in tensors(theirs).items():
        assert_close(tensors(ours)[name], tensor, 1e-5)
    expected = plain()(torch.ones(1, 64))
    assert before.shape == expected.shape


def test_loftq_makes_up_for_a_part_of_what_was_rounded(tmp_path: Path) -> None:
    # the branch has a scale of 1, of which LoftQ knows nothing
    model = get_peft_model(
        quantised_from(plain(), tmp_path), LoraConfig(r=16, lora_alpha=16, target_modules=["0", "2"])
    )
    x = torch.randn(20, 64)
    expected, before = plain()(x), model(x)
    replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
    assert (model(x) - expected).norm() < 0.8 * (before - expected).norm()


def test_a_callback_decides_for_each_layer(tmp_path: Path) -> None:
    model = get_peft_model(quantised_from(plain(), tmp_path), config(NF4))
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    seen: list[str] = []

    def keep_the_second(given: nn.Module, name: str) -> bool:
        assert given is model
        seen.append(name)
        return name == "2"

    replace_lora_weights_loftq(model, tmp_path, callback=keep_the_second)
    assert seen == ["0", "2"]
    changed = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"base_model.model.2.lora_{factor}.weight" for factor in "AB"}


def test_what_cannot_be_replaced_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    model = get_peft_model(quantised_from(plain(), folder, **{"2.weight": "other"}), config(NF4))
    other = get_peft_model(quantised_from(plain(), tmp_path), LoraConfig(r=65, target_modules=["0"]))
    plain_one = get_peft_model(plain(), LoraConfig(target_modules=["0"]))
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (model, folder, CheckpointError, r"the model's file has no 2\.weight"),
        (model, tmp_path / "nowhere", FileNotFoundError, "pass the model's safetensors as model_path"),
        (model, None, ValueError, "pass the safetensors file as model_path"),
        (other, tmp_path, AdaptError, "has 64 directions, and r is 65"),
        (plain_one, tmp_path, AdaptError, "adapts no layer whose weight bitsandbytes has quantised to 4 bits"),
    ]
    for given, path, error, reason in cases:
        before = laws.snapshot(given)
        with pytest.raises(error, match=reason):
            replace_lora_weights_loftq(given, path)
        laws.require_unchanged(given, before, "a refused replacement")
