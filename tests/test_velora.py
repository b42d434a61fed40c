"""VeLoRA's training and files beside PEFT's, and what it keeps for the backward."""

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
from graphpeft import LoraConfig, PeftModel, VeloraConfig, get_peft_model

OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
KINDS = ["batch_average", "batch_average_once", "random"]


def config(library: Any, kind: str, **options: Any) -> Any:
    own = library.VeloraConfig(num_groups=5, scale=0.7, init_type=kind)
    return library.LoraConfig(**OPTIONS | {"velora_config": own} | options)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 20, (3, 5), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_has_pefts_values_outputs_and_files(kind: str, dtype: torch.dtype, tmp_path: Path):
    following, models = [], []
    for library in (peft, graphpeft):
        base = LLAMA.build().to(dtype)
        torch.manual_seed(7)
        models.append(library.get_peft_model(base, config(library, kind)).eval())  # type: ignore[attr-defined]
        following.append(torch.rand(2))
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


@pytest.mark.parametrize("is_autocast", [False, True], ids=["single", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_steps_are_pefts_also_after_loading(kind: str, is_autocast: bool, tmp_path: Path):
    first: Any = moved(peft.get_peft_model(LLAMA.build(), config(peft, kind, lora_dropout=0.3)))
    first.save_pretrained(str(tmp_path / "0"))
    folders = {peft: tmp_path / "0", graphpeft: tmp_path / "0"}
    for stage in (1, 2):
        losses, vectors = [], []
        for library, folder in folders.items():
            model: Any = library.PeftModel.from_pretrained(LLAMA.build(), str(folder), is_trainable=True).train()  # type: ignore[attr-defined]
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            torch.manual_seed(3)
            losses.append([])
            for step in range(3):
                with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                    loss = model(input_ids=ids(10 * stage + step), labels=ids(step)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
            folders[library] = tmp_path / f"{library.__name__} {stage}"
            model.save_pretrained(str(folders[library]))
            tensors = load_file(folders[library] / "adapter_model.safetensors")
            vectors.append([tensor for name, tensor in sorted(tensors.items()) if "velora" in name])
        assert losses[1] == pytest.approx(losses[0], rel=2e-2 if is_autocast else 1e-5)
        assert all(bool(vector.any()) for vector in vectors[1])
        torch.testing.assert_close(*vectors, atol=5e-2 if is_autocast else 1e-5, rtol=1e-2 if is_autocast else 1e-4)


def test_a_gradient_is_an_approximation_and_the_input_is_not_kept():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def kept(options: dict[str, Any]) -> tuple[int, Tensor]:
        torch.manual_seed(0)
        model: Any = moved(
            get_peft_model(nn.Sequential(nn.Linear(64, 16)), LoraConfig(r=2, target_modules=["0"], **options))
        )
        sizes: dict[int, int] = {}
        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.train()(x).square().mean()
        loss.backward()
        return sum(sizes.values()), model[0].default.lora_A.grad

    exact, compressed = kept({}), kept({"velora_config": VeloraConfig(num_groups=4)})
    assert not torch.allclose(exact[1], compressed[1], rtol=1e-2)
    assert compressed[0] <= exact[0] - 64 * 32 + 4 * 32 + 64 // 4
    # a group for each feature loses nothing but the sign and the length of the vector
    single = kept({"velora_config": VeloraConfig(num_groups=64)})
    torch.testing.assert_close(single[1], exact[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed_it_trains_the_same(way: str, kind: str):
    gradients = []
    for is_other in (False, True):
        model: Any = moved(get_peft_model(LLAMA.build(), config(graphpeft, kind))).train()
        run = model
        if is_other and way == "compiled":
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        elif is_other:
            named = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            named({"use_reentrant": False})
        for seed in (0, 1):
            run(input_ids=ids(seed)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="velora_config: num_groups must be a positive integer"):
        LoraConfig(velora_config={"num_groups": 0})
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        VeloraConfig(scale=0)
    with pytest.raises(ValueError, match="init_type must be"):
        VeloraConfig(init_type="mean")  # type: ignore[arg-type]
