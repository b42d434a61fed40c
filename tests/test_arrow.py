"""Arrow's router over saved adapters beside PEFT's, and what `create_arrow_model` refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import GPT2, LLAMA, Example
from oracle import assert_close, moved
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False", "ignore:Setting `save_embedding_layers`"
)

TARGETS: dict[str, list[str]] = {"LLAMA": ["q_proj", "down_proj"], "GPT2": ["c_attn", "c_fc"]}


def saved(example: Example, folder: Path, count: int = 4, **options: Any) -> list[str]:
    """Returns the folders of some adapters of different values."""
    names = TARGETS["GPT2" if example is GPT2 else "LLAMA"]
    for number in range(count):
        own = {"r": 3, "lora_alpha": 4 + number, "target_modules": names, **options}
        moved(peft.get_peft_model(example.build(), peft.LoraConfig(**own)), number).save_pretrained(
            str(folder / str(number))
        )
    return [str(folder / str(number)) for number in range(count)]


def ids() -> Tensor:
    return torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(0))


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_gks", [False, True])
@pytest.mark.parametrize("example", [LLAMA, GPT2], ids=str)
def test_outputs_are_pefts(example: Example, use_gks: bool, dtype: torch.dtype, tmp_path: Path):
    paths = saved(example, tmp_path)
    models = []
    for library in (peft, graphpeft):
        own = library.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=use_gks, rng_seed=5)
        base = example.build().to(dtype)
        models.append(library.create_arrow_model(base, paths[:3], own, paths[3:]).eval())
    expected, found = map(logits, models)
    assert_close(found, expected, 1e-5 if dtype == torch.float32 else 5e-2)
    assert not torch.allclose(found, logits(example.build().to(dtype)), atol=1e-2)
    assert list(models[1].peft_config) == list(models[0].peft_config)
    for name in ("task_0", "task_2"):
        for model in models:
            model.set_adapter(name)
        if not use_gks:  # PEFT changes the experts themselves
            assert_close(logits(models[1]), logits(models[0]), 1e-5 if dtype == torch.float32 else 5e-2)


def test_the_same_seed_gives_the_same_prototypes_and_none_draws(tmp_path: Path):
    paths = saved(LLAMA, tmp_path, 2)
    found = []
    for number, seed in enumerate((5, 5, None, None)):
        base = LLAMA.build()
        torch.manual_seed(number)
        model = create_arrow_model(base, paths, ArrowConfig(top_k=1, rng_seed=seed))
        found.append(model.model.layers[0].mlp.down_proj.arrow_router.lora_arrow_prototypes)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])
    # the direction is the same, and its sign has no meaning
    torch.testing.assert_close((found[0] * found[2]).sum(-1).abs(), torch.ones(2), atol=2e-2, rtol=0)


def test_its_file_is_loaded_here(tmp_path: Path):
    model = create_arrow_model(LLAMA.build(), saved(LLAMA, tmp_path, 3), ArrowConfig(top_k=2))
    expected = logits(model)
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "all" / "arrow_router")
    assert torch.equal(logits(again), expected)
    config = again.peft_config["default"].arrow_config
    assert (config.top_k, config.task_adapter_names) == (2, ["task_0", "task_1", "task_2"])
    assert torch.equal(logits(copy.deepcopy(again)), expected)


def test_it_is_one_of_several_and_not_merged(tmp_path: Path):
    model = create_arrow_model(LLAMA.build(), saved(LLAMA, tmp_path, 3), ArrowConfig(top_k=2))
    alone = {"arrow_router": logits(model), "__base__": logits(LLAMA.build())}
    model.set_adapter("task_1")
    alone["task_1"] = logits(model)
    names = ["arrow_router", "__base__", "task_1"]
    found = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], alone[name][row], atol=1e-5, rtol=1e-4)
    model.set_adapter(["arrow_router", "task_1"])
    together = logits(model)
    assert not torch.allclose(together, alone["arrow_router"], atol=1e-3)
    with pytest.raises(AdaptError, match="Arrow chooses experts for each token"):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), alone["__base__"])
    assert torch.equal(logits(model), together)
    assert torch.equal(logits(model.unload()), alone["__base__"])


def test_gradients_go_to_what_is_before_it(tmp_path: Path):
    paths = saved(LLAMA, tmp_path, 3)
    embeds = torch.randn(2, 5, LLAMA.build().config.hidden_size, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    found = []
    for library in (peft, graphpeft):
        model = library.create_arrow_model(LLAMA.build(), paths, library.ArrowConfig(top_k=2, rng_seed=5)).eval()
        own = embeds.clone().requires_grad_()
        model(inputs_embeds=own).logits.square().mean().backward()
        found.append(own.grad)
    torch.testing.assert_close(*found)


def test_compiled_it_computes_the_same(tmp_path: Path):
    model = create_arrow_model(LLAMA.build(), saved(LLAMA, tmp_path, 2), ArrowConfig(top_k=1))
    assert_close(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), logits(model), 1e-5)


def unlike(folder: Path, **options: Any) -> list[str]:
    """Returns the folders of two adapters, of which the second has other options."""
    return [*saved(LLAMA, folder / "plain", 1), *saved(LLAMA, folder / "other", 1, **options)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 2}, "'task_1' is of other layers or of another rank than 'task_0'"),
        ({"target_modules": ["q_proj"]}, "'task_1' is of other layers or of another rank than 'task_0'"),
        ({"rank_pattern": {"q_proj": 2}}, r"'task_1' has the ranks \[2, 3\]"),
        ({"use_dora": True}, "'task_1' is more than LoRA of linear layers"),
        ({"target_modules": ["embed_tokens"]}, "'task_1' is more than LoRA of linear layers at model.embed_tokens"),
    ],
    ids=str,
)
def test_adapters_that_are_not_alike_are_refused(options: dict[str, Any], reason: str, tmp_path: Path):
    paths, model = unlike(tmp_path, **options), LLAMA.build()
    with pytest.raises(ValueError, match=reason):
        create_arrow_model(model, paths, ArrowConfig(top_k=1))
    assert not isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(LLAMA.build()))


def test_options_that_cannot_be_are_refused(tmp_path: Path):
    paths = saved(LLAMA, tmp_path, 2)
    for config, given, reason in (
        (ArrowConfig(), paths, "top_k=3 experts for a token, and there are 2"),
        (ArrowConfig(top_k=1, use_gks=True), paths, "use_gks=True needs general_adapter_paths"),
        (ArrowConfig(top_k=1), [], "task_specific_adapter_paths is empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            create_arrow_model(LLAMA.build(), given, config)
    with pytest.raises(ValueError, match="which create_arrow_model makes"):
        LoraConfig(arrow_config=ArrowConfig())
    with pytest.raises(ValueError, match="router_temperature must be positive"):
        ArrowConfig(router_temperature=0)
    with pytest.raises(FileNotFoundError):
        create_arrow_model(LLAMA.build(), [*paths, str(tmp_path / "none")], ArrowConfig(top_k=1))
    config = ArrowConfig(top_k=1)
    config.task_adapter_names = ["task_0"]
    with pytest.raises(AdaptError, match="Arrow is for linear layers"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(arrow_config=config, target_modules=["0"]))
