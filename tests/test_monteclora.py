"""MonteCLoRA's training, loss and files beside PEFT's, with equal samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import LLAMA
from oracle import assert_close, moved
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model, monteclora_loss

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
OWN = {"num_samples": 5, "sample_scaler": 0.3, "kl_loss_weight": 0.01, "buffer_size": 2}


def config(library: Any, **options: Any) -> Any:
    own = library.MontecloraConfig(**OWN | options)
    return library.LoraConfig(**OPTIONS, monteclora_config=own)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **options).logits


def let_it_draw_in_each_forward(model: Any) -> None:
    """Takes PEFT's buffers away: each forward draws its samples as ours do."""
    for module in model.modules():
        if type(module).__name__ == "MontecloraSampler":
            module.sampler.get = lambda of=module: drawn(of.num_samples, of.in_features, of.out_features)


def set_dtypes_as_a_forward_does(model: Any) -> None:
    """Gives what a forward writes the dtype that it has then: PEFT's buffers have another one until the first."""
    for module in model.modules():
        if type(module).__name__ == "MontecloraSampler":
            module.gaussian_var_prior = module.gaussian_var_prior.float()
            module.expert_weights = module.expert_weights.float()


def drawn(samples: int, features: int, rank: int) -> dict[str, Tensor]:
    normal = torch.randn(samples, features, rank)
    squares = torch.randn(rank, rank).square().sum(1)
    return {"z_mvn": normal, "z_wishart": squares.diag(), "z_dirichlet": torch.randn(samples)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_has_pefts_values_outputs_and_files(dtype: torch.dtype, tmp_path: Path):
    following, models = [], []
    for library in (peft, graphpeft):
        base = LLAMA.build().to(dtype)
        torch.manual_seed(7)
        models.append(library.get_peft_model(base, config(library)).eval())  # type: ignore[attr-defined]
        following.append(torch.rand(2))
        if dtype != torch.float32:
            set_dtypes_as_a_forward_does(models[-1])
        models[-1].save_pretrained(str(tmp_path / library.__name__))
    assert torch.equal(*following)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("graphpeft", "peft"))
    assert {key: tensor.dtype for key, tensor in ours.items()} == {key: t.dtype for key, t in theirs.items()}
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    moved(models[0]).save_pretrained(str(tmp_path / "moved"))
    model = PeftModel.from_pretrained(LLAMA.build().to(dtype), tmp_path / "moved").eval()
    expected = logits(model)
    assert_close(expected, logits(models[0]), 1e-5 if dtype == torch.float32 else 5e-2)
    if dtype == torch.float32:
        model.save_pretrained(tmp_path / "again")
        again = peft.PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "again")).eval()
        assert_close(logits(again), expected, 1e-5)
        assert_close(logits(model.merge_and_unload()), expected, 1e-5)


@pytest.mark.parametrize("options", [{}, {"use_entropy": True, "dirichlet_prior": 2.0}], ids=["plain", "entropy"])
def test_losses_and_gradients_of_several_steps_are_pefts(options: dict[str, Any], tmp_path: Path):
    start: Any = moved(peft.get_peft_model(LLAMA.build(), config(peft, **options)))
    start.save_pretrained(str(tmp_path / "start"))
    losses, files = [], []
    for library in (peft, graphpeft):
        model: Any = library.PeftModel.from_pretrained(  # type: ignore[attr-defined]
            LLAMA.build(), str(tmp_path / "start"), is_trainable=True
        ).train()
        let_it_draw_in_each_forward(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        torch.manual_seed(3)
        losses.append([])
        for step in range(4):
            loss = model(input_ids=ids(step), labels=ids(step + 10)).loss
            own = model.base_model._get_monteclora_loss() if library is peft else monteclora_loss(model)
            (loss + own).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1] += [loss.item(), own.item()]
        model.save_pretrained(str(tmp_path / library.__name__))
        files.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][2]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_the_loss_is_of_the_active_adapters_and_of_training():
    model: Any = moved(get_peft_model(LLAMA.build(), config(graphpeft))).train()
    before = monteclora_loss(model)
    model(input_ids=ids())
    assert monteclora_loss(model) != before
    found = monteclora_loss(model)
    model.add_adapter("plain", LoraConfig(**OPTIONS))
    model.set_adapter("plain")
    assert monteclora_loss(model) == 0
    torch.testing.assert_close(monteclora_loss(model, "default"), found)
    assert monteclora_loss(model.eval(), "default") == 0


def test_the_loss_of_a_forward_stays_what_it_is_when_another_one_draws():
    x, options = torch.ones(3, 8), MontecloraConfig(num_samples=4, use_entropy=True)
    found = []
    for at_once in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["0"], monteclora_config=options)
        model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 16)), config).train()
        losses = []
        for _ in range(2):
            losses.append(model(x).square().sum() + monteclora_loss(model))
            if not at_once:
                losses.pop().backward()
        if at_once:
            torch.stack(losses).sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


def test_a_training_goes_on_as_it_was_with_the_generators_state(tmp_path: Path):
    def step(model: Any) -> float:
        return model(input_ids=ids()).logits.square().mean().item()

    first: Any = moved(get_peft_model(LLAMA.build(), config(graphpeft))).train()
    step(first)
    first.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    expected = [step(first) for _ in range(3)]
    second = PeftModel.from_pretrained(LLAMA.build(), tmp_path, is_trainable=True).train()
    torch.set_rng_state(state)
    assert [step(second) for _ in range(3)] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed_it_trains_the_same(way: str):
    gradients = []
    for is_other in (False, True):
        model: Any = moved(get_peft_model(LLAMA.build(), config(graphpeft))).train()
        run = model
        if is_other and way == "compiled":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif is_other:
            named = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            named({"use_reentrant": False})
        torch.manual_seed(5)
        for seed in (0, 1):
            run(input_ids=ids(seed)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_has_the_mean_and_the_spread_that_its_file_tells():
    torch.manual_seed(0)
    own = MontecloraConfig(num_samples=3, sample_scaler=0.5, buffer_size=1)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(400, 2)), LoraConfig(r=2, target_modules=["0"], monteclora_config=own)
    )
    tensors = model[0].default
    with torch.no_grad():
        tensors.lora_A.fill_(2.0)
        tensors.lora_B.copy_(torch.eye(2))
        model[0].weight.zero_()
        model[0].bias.zero_()
        drawn_a = model.train()(torch.eye(400)).mT / tensors.lora_scaling
    spread = 0.5 * tensors.lora_monteclora_weights.norm() * tensors.lora_monteclora_variances.diag().sqrt()
    torch.testing.assert_close(drawn_a.mean(1), torch.full((2,), 2.0), atol=0.2, rtol=0)
    torch.testing.assert_close(drawn_a.std(1), spread, rtol=0.2, atol=0)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="monteclora_config: num_samples must be a positive integer"):
        LoraConfig(monteclora_config={"num_samples": 0})
    with pytest.raises(ValueError, match="dirichlet_prior must be positive and finite"):
        MontecloraConfig(dirichlet_prior=0)
    with pytest.raises(ValueError, match="can't go with"):
        LoraConfig(monteclora_config={}, kasa_config={})
