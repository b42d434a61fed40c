"""Models that accelerate offloads to main memory or disk: adapted before or after, they are what they are without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    AdaptError,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    explain,
    get_peft_model,
    get_peft_model_state_dict,
)
from graphpeft.adapters.changes import add_change
from graphpeft.adapters.dispatching import dispatch_again

CPU = torch.device("cpu")
IDS = torch.arange(12).reshape(2, 6)
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MAP: dict[str, Any] = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def base(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **SIZES, **options)).eval()


def on_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=CPU)


def on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder / "offloaded", execution_device=CPU)


def dispatched(model: Any, folder: Path) -> Any:
    return accelerate.dispatch_model(model, MAP, main_device=CPU, offload_dir=folder / "offloaded")


PLACES = pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "pissa": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}
METHODS = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def adapted(model: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **{"init_lora_weights": False, **options})).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(1.3)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits(model).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@METHODS
@PLACES
@pytest.mark.parametrize("order", ["offloaded, then adapted", "adapted, then offloaded"])
def test_an_offloaded_adapted_model_is_what_it_is_in_memory(
    order: str, offload: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    expected = adapted(base(), options)
    if order.startswith("offloaded"):
        model = adapted(offload(base(), tmp_path), options)
    else:
        model = offload(adapted(base(), options), tmp_path)
    assert model.lm_head._parameters["weight"].is_meta or offload is dispatched
    close(logits(model), logits(expected))
    close(gradients(model), gradients(expected))
    assert list(trained(model)) == list(trained(expected))
    with model.disable_adapter():
        close(logits(model), logits(base()))
    close(get_peft_model_state_dict(model), get_peft_model_state_dict(expected))
    remove_hook_from_module(model, recurse=True)
    close(logits(model), logits(expected))
    assert list(trained(model)) == list(trained(expected))
    close(model.unload().state_dict(), expected.unload().state_dict())


@METHODS
@PLACES
def test_an_adapter_is_merged_into_offloaded_weights(
    offload: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model, expected = adapted(offload(base(), tmp_path), options), logits(adapted(base(), options))
    if options.keys().isdisjoint({"init_lora_weights", "trainable_token_indices"}):
        model.merge_adapter()
        close(logits(model), expected)
        model.unmerge_adapter()
        close(logits(model), expected)
    copied = copy.deepcopy(model).merge_and_unload()
    close(logits(copied), expected)
    close(logits(model), expected)
    remove_hook_from_module(copied, recurse=True)
    close(logits(copied), expected)


@PLACES
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails_leaves_offloaded_weights_as_they_were(
    merge: str, offload: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(offload(base(), tmp_path), CONFIGS["lora"])
    expected, merged = logits(model), []

    def fail_at_fifth(*args: Any) -> None:
        merged.append(args)
        if len(merged) == 5:
            raise MemoryError
        add_change(*args)

    monkeypatch.setattr("graphpeft.adapters.merging.add_change", fail_at_fifth)
    with pytest.raises(MemoryError):
        getattr(model, merge)()
    close(logits(model), expected)
    with model.disable_adapter():
        close(logits(model), logits(base()))


@PLACES
def test_files_go_both_ways_with_peft(offload: Callable[..., Any], tmp_path: Path) -> None:
    ours = adapted(offload(base(), tmp_path), CONFIGS["modules_to_save"])
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    close(logits(ours), logits(theirs))
    theirs.save_pretrained(str(tmp_path / "again"))
    loaded = PeftModel.from_pretrained(offload(base(), tmp_path), tmp_path / "again")
    close(logits(loaded), logits(theirs))


def test_a_table_of_an_offloaded_embedding_is_saved_and_loaded(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"]}
    ours, other = adapted(on_cpu(base(), tmp_path), options), base()
    ours.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    other.model.embed_tokens.weight.data.mul_(2)
    loaded = PeftModel.from_pretrained(on_cpu(other, tmp_path), tmp_path / "adapter")
    close(logits(loaded), logits(ours))
    close(other.unload().model.embed_tokens._hf_hook.weights_map["weight"], 2 * base().model.embed_tokens.weight)


def test_what_is_tied_is_untied_where_an_adapter_of_one_is_merged(tmp_path: Path) -> None:
    options = {"target_modules": ["lm_head"]}
    model = adapted(on_cpu(base(tie_word_embeddings=True), tmp_path), options)
    expected = logits(model)
    close(logits(model.merge_and_unload()), expected)


@PLACES
def test_an_optimizer_goes_on_with_an_adapter_that_was_there_before_the_model_was_offloaded(
    offload: Callable[..., Any], tmp_path: Path
) -> None:
    model, expected = adapted(base(), CONFIGS["lora"]), adapted(base(), CONFIGS["lora"])
    steps = [torch.optim.AdamW(trained(each).values(), lr=0.1) for each in (model, expected)]
    offload(model, tmp_path)
    for each, optimizer in zip((model, expected), steps, strict=True):
        gradients(each)
        optimizer.step()
    close(logits(model), logits(expected))


@PLACES
def test_two_adapters_act_in_turn_together_and_by_rows(offload: Callable[..., Any], tmp_path: Path) -> None:
    models = offload(base(), tmp_path), base()
    for model in models:
        adapted(model, CONFIGS["lora"])
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=9, target_modules=["v_proj"], init_lora_weights=False))
    for active in ("other", ["other", "default"], "default"):
        for model in models:
            model.set_adapter(active)
        close(*map(logits, models))
    close(*(model(input_ids=IDS, adapter_names=["other", "__base__"]).logits for model in models))
    for model in models:
        model.set_adapter("other")
        model.delete_adapter("default")
    close(*map(logits, models))


def test_generation_and_a_prompt_work_under_hooks(tmp_path: Path) -> None:
    found = []
    for model in (dispatched(base(), tmp_path), base()):
        torch.manual_seed(3)
        get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
        with model.disable_adapter():
            close(logits(model), logits(base()))
        found.append((logits(model), model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)))
    close(*found)


def test_explain_changes_nothing_in_an_offloaded_model(tmp_path: Path) -> None:
    model = dispatched(base(), tmp_path)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert len(explain(model, LoraConfig(target_modules="all-linear")).adapted) == 14
    with pytest.raises(AdaptError):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "norm"]))
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == tensors


class Functional(nn.Module):
    """Uses its weight by a function, so that its own forward is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + nn.functional.linear(x, self.w)


def test_a_forward_that_is_recorded_is_that_of_the_module_and_not_the_hook() -> None:
    torch.manual_seed(2)
    model: Any = nn.Sequential(Functional(), nn.Linear(4, 3))
    x, expected = torch.randn(2, 4), copy.deepcopy(model)
    on_cpu(model, Path())
    for each in (model, expected):
        torch.manual_seed(3)
        get_peft_model(each, LoraConfig(r=2, target_modules=["w", "inner"], init_lora_weights=False))
    close(model(x), expected(x))
    assert model[0].inner._parameters["weight"].is_meta
    close(model.merge_and_unload()(x), expected(x))


def test_modules_that_are_loaded_with_all_inside_are_refused() -> None:
    model = accelerate.cpu_offload(base(), CPU, preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(
        AdaptError, match=r"offloads model\.layers\.0 with all that is in it, as preload_module_classes"
    ):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    close(logits(model), logits(base()))


def test_an_adapter_goes_under_a_hook_and_remains_when_that_goes() -> None:
    model, expected = base(), adapted(base(), CONFIGS["lora"])
    seen = []

    class Seeing(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            seen.append(module)
            return output

    add_hook_to_module(model.lm_head, Seeing())
    adapted(model, CONFIGS["lora"])
    close(logits(model), logits(expected))
    assert seen == [model.lm_head]
    remove_hook_from_module(model.lm_head)
    with model.disable_adapter():
        close(logits(model), logits(base()))
    close(logits(model), logits(expected))
    assert seen == [model.lm_head]


def test_a_model_whose_hooks_were_removed_is_adapted_like_any_other() -> None:
    model = remove_hook_from_module(on_cpu(base(), Path()), recurse=True)
    close(logits(adapted(model, CONFIGS["dora"])), logits(adapted(base(), CONFIGS["dora"])))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("head", ["cpu", "disk"])
def test_a_trained_copy_of_a_tied_weight_is_not_tied_by_accelerate(head: str, tmp_path: Path) -> None:
    model = tied()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    places = MAP | {"model.embed_tokens": "cpu", "lm_head": head}
    with pytest.raises(RuntimeError, match=r"weight of a Linear is tied .* dispatch the model before"):
        accelerate.dispatch_model(model, places, main_device=CPU, offload_dir=str(tmp_path), force_hooks=True)


def test_what_is_tied_cannot_be_told_of_an_offloaded_model() -> None:
    model = tied()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    options: dict[str, Any] = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    with pytest.raises(AdaptError, match="ensure_weight_tying=True: which weights are tied can't be told"):
        get_peft_model(model, LoraConfig(**options))
    with pytest.raises(AdaptError, match="rows that are trained: which weights are tied can't be told"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))


def test_the_base_state_dict_of_an_offloaded_model_would_have_no_values() -> None:
    model = accelerate.cpu_offload(adapted(base(), CONFIGS["lora"]), execution_device=CPU)
    for function in (graphpeft.get_base_model_state_dict, lambda m: graphpeft.set_base_model_state_dict(m, {})):
        with pytest.raises(AdaptError, match=r"are offloaded, so that no state dict has their values"):
            function(model)


def tied() -> Any:
    """Returns a model whose head has the table of its embedding."""
    config = copy.deepcopy(base().config)
    config.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(config).eval()


# other places than before


def test_a_model_is_dispatched_anew_as_the_caller_asks(tmp_path: Path) -> None:
    model = adapted(dispatched(base(), tmp_path), CONFIGS["lora"])
    expected = logits(model)
    swapped = {path: "disk" if device == "cpu" else "cpu" for path, device in MAP.items()}
    dispatch_again(model, device_map=swapped, offload_folder=tmp_path / "again")
    assert model.hf_device_map == swapped
    assert [model.lm_head.weight.is_meta, model.model.norm.weight.is_meta] == [False, True]
    close(logits(model), expected)
    dispatch_again(model, max_memory={"cpu": "1GB"})
    assert not any(parameter.is_meta for parameter in model.parameters())
    close(logits(model), expected)


def test_a_model_is_dispatched_anew_when_an_adapter_is_loaded(tmp_path: Path) -> None:
    expected = adapted(base(), CONFIGS["lora"])
    expected.save_pretrained(tmp_path / "adapter")
    swapped = {path: "disk" if device == "cpu" else "cpu" for path, device in MAP.items()}
    options = {"device_map": swapped, "offload_folder": tmp_path / "again"}
    model = PeftModel.from_pretrained(dispatched(base(), tmp_path), tmp_path / "adapter", **options)
    assert model.hf_device_map == swapped
    close(logits(model), logits(expected))


def test_a_model_that_transformers_loads_from_disk_is_dispatched_anew(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=MAP, offload_folder=tmp_path / "offloaded"
    )
    adapted(model, CONFIGS["lora"])
    close(logits(model), logits(adapted(base(), CONFIGS["lora"])))
    swapped = {**MAP, "model.layers.1": "disk", "lm_head": "cpu"}
    dispatch_again(model, device_map=swapped, offload_folder=tmp_path / "again")
    close(logits(model), logits(adapted(base(), CONFIGS["lora"])))


def test_a_model_that_isnt_offloaded_stays_where_it_is(tmp_path: Path) -> None:
    model = adapted(base(), CONFIGS["lora"])
    dispatch_again(model, device_map="auto", offload_dir=tmp_path)
    assert not hasattr(model, "hf_device_map")
    with pytest.raises(ValueError, match="two names of one option"):
        dispatch_again(model, offload_dir=tmp_path, offload_folder=tmp_path)
