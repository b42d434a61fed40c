"""X-LoRA: a classifier weighs LoRA adapters for each token, by a first run of the model."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from experts import TEXT, config, experts, saved
from models import GPT2, LLAMA, Example
from oracle import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpeft
from graphpeft import (
    AdaptError,
    AdaptionPromptConfig,
    CheckpointError,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShadowConfig,
    TaskType,
    XLoraConfig,
    export,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    set_peft_model_state_dict,
    trace,
)
from graphpeft.testing import assert_copies_stay_adapted, assert_two_adapters_act_together, laws

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "layers apart": {"layerwise_scalings": True},
    "deep": {"xlora_depth": 3, "xlora_size": 7, "layerwise_scalings": True},
    "deep without dropout": {"xlora_depth": 2, "xlora_size": 5, "xlora_dropout_p": 0.0},
    "without softmax": {"enable_softmax": False},
    "best": {"top_k_lora": 1, "layerwise_scalings": True},
    "softmax of the best": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
    "first run with experts": {"scaling_pass_value": 0.5, "global_scaling_weight": 1.7, "softmax_temperature": 0.3},
    "first run with the best": {"scaling_pass_value": 0.5, "top_k_lora": 1},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def without_cache(example: Example = LLAMA) -> Any:
    """Builds a model of which PEFT takes X-LoRA."""
    model: Any = example.build()
    model.config.use_cache = False
    return model


def classifier(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "classifier" in name]


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in classifier(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ours(**options: Any) -> Any:
    return moved(get_peft_model(without_cache(), config(LLAMA, **options)))


def theirs(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    given = {"hidden_size": without_cache().config.hidden_size, "adapters": experts(LLAMA), "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(without_cache().to(dtype), peft.XLoraConfig(**given | options))


def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


# PEFT's numbers and files


@each_option
def test_outputs_scalings_gradients_and_generated_tokens_are_pefts(options: dict[str, Any]) -> None:
    model, other = ours(**options), moved(theirs(**options))
    assert_close(logits(model, attention_mask=MASK), logits(other, attention_mask=MASK))
    torch.testing.assert_close(model.get_latest_scalings(), other.get_latest_scalings(), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(without_cache())).abs().max() > 1e-2
    for each in (model, other):
        each(input_ids=IDS, labels=IDS).loss.backward()
    assert len(classifier(model)) == len(classifier(other)) > 0
    for own, their in zip(classifier(model), classifier(other), strict=True):
        torch.testing.assert_close(own.grad, their.grad, atol=1e-6, rtol=1e-5)
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given), other.generate(**given))


@each_option
def test_equal_seeds_give_pefts_classifier_and_then_equal_numbers(options: dict[str, Any]) -> None:
    found = []
    experts(LLAMA)  # which are made once, and draw numbers
    for make in (lambda: get_peft_model(without_cache(), config(LLAMA, **options)), lambda: theirs(**options)):
        torch.manual_seed(3)
        model = make()
        found.append([*classifier(model), torch.rand(2)])
        trained, counted = model.get_nb_trainable_parameters()
        found[-1].append(torch.tensor([trained, counted]))
    for own, their in zip(*found, strict=True):
        assert torch.equal(own, their)


@each_option
def test_files_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    model = ours(**options)
    model.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(without_cache(), str(tmp_path / "ours")).eval()
    assert_close(logits(there), logits(model))
    other = moved(theirs(**options))
    other.save_pretrained(str(tmp_path / "theirs"))
    here: Any = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "theirs")
    assert_close(logits(here), logits(other))
    assert [p for p in here.parameters() if p.requires_grad] == []


def test_peft_writes_no_whole_classifier_and_a_file_without_it_is_refused(tmp_path: Path) -> None:
    moved(theirs(xlora_depth=2, xlora_size=5)).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    lost = {f"base_model.internal_xlora_classifier.layers.0.{kind}" for kind in ("weight", "bias")}
    assert not lost & load_file(file).keys()
    PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    shutil.rmtree(tmp_path / "0")
    with pytest.raises(CheckpointError, match=r"lacks .*internal_xlora_classifier\.layers\.0"):
        PeftModel.from_pretrained(LLAMA.build(), tmp_path)


def test_a_whole_file_has_the_classifier_alone_and_is_read_without_what_is_beside_it(tmp_path: Path) -> None:
    model = ours()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.internal_xlora_classifier.layers.0.{kind}" for kind in ("weight", "bias")}
    beside = {key.replace("layers.0", "layers"): tensor + 1 for key, tensor in tensors.items()}
    (tmp_path / "0").mkdir()
    save_file(beside, tmp_path / "0" / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.build(), tmp_path)), logits(model))


def test_a_base_in_half_precision_has_pefts_dtypes_and_outputs(tmp_path: Path) -> None:
    other = moved(theirs(torch.bfloat16))
    other.save_pretrained(str(tmp_path))
    model: Any = PeftModel.from_pretrained(LLAMA.build().bfloat16(), tmp_path)
    assert {p.dtype for p in classifier(model)} == {p.dtype for p in classifier(other)} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), logits(other), atol=2e-2, rtol=1e-2)
    experts_here = [p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj.default.xlora_A" in name]
    experts_there = [p for name, p in other.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in name]
    assert torch.equal(experts_here[0], torch.cat(experts_there))


def test_training_draws_as_peft_does() -> None:
    options = {"adapters": experts(LLAMA, 0.4), "xlora_depth": 2, "xlora_size": 8}
    found = []
    for model in (ours(**options), moved(theirs(**options))):
        model.train()
        torch.manual_seed(2)
        found.append((logits(model), torch.rand(2)))
    assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][0] - logits(ours(**options))).abs().max() > 1e-2


def test_experts_that_are_trained_are_in_the_file_which_peft_reads(tmp_path: Path) -> None:
    models = [ours(use_trainable_adapters=True), moved(theirs(use_trainable_adapters=True))]
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    before = logits(models[0])
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert_close(logits(models[0]), logits(models[1]))
    assert (logits(models[0]) - before).abs().max() > 1e-2
    models[0].save_pretrained(tmp_path / "ours")
    for loaded in (
        peft.PeftModel.from_pretrained(without_cache(), str(tmp_path / "ours")).eval(),
        PeftModel.from_pretrained(LLAMA.build(), tmp_path / "ours"),
    ):
        assert_close(logits(loaded), logits(models[0]))
    # PEFT loses them: both libraries read its file with the experts as they were
    models[1].save_pretrained(str(tmp_path / "theirs"))
    here, there = ours(use_trainable_adapters=True), moved(theirs(use_trainable_adapters=True))
    for own, trained in zip(classifier(there), classifier(models[1]), strict=True):
        own.data.copy_(trained)
    here = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "theirs")
    assert_close(logits(here), logits(there))


def test_a_file_with_some_trained_experts_alone_is_refused(tmp_path: Path) -> None:
    ours(use_trainable_adapters=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if key.endswith("q_proj.lora_A.1.weight"))]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lacks some of .*q_proj\.lora_A\.0\.weight"):
        PeftModel.from_pretrained(LLAMA.build(), tmp_path)


def test_a_file_with_a_trained_expert_of_another_shape_is_refused(tmp_path: Path) -> None:
    ours(use_trainable_adapters=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.1.weight"))
    for damaged in (tensors[key][:, 1:], tensors[key][0, 0], tensors[key].to(torch.float8_e5m2)):
        save_file({**tensors, key: damaged.contiguous()}, file)
        with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.1\.weight is of shape"):
            PeftModel.from_pretrained(LLAMA.build(), tmp_path)


def test_an_embedding_has_experts(tmp_path: Path) -> None:
    given = {
        "adapters": {
            "0": saved(LLAMA.build(), str(tmp_path / "one"), target_modules=["embed_tokens"]),
            "1": saved(LLAMA.build(), str(tmp_path / "another"), target_modules=["embed_tokens", "up_proj"]),
        },
        "layerwise_scalings": True,
    }
    for trains in (False, True):
        model = ours(**given, use_trainable_adapters=trains)
        assert_close(logits(model), logits(moved(theirs(**given))))
        model.save_pretrained(tmp_path / "adapter")
        there = peft.PeftModel.from_pretrained(without_cache(), str(tmp_path / "adapter")).eval()
        assert_close(logits(there), logits(model))


def test_experts_of_gpt2_are_weighed_where_peft_cannot_load_them() -> None:
    with pytest.raises(ValueError, match="unexpected keys"):
        peft.get_peft_model(
            without_cache(GPT2),
            peft.XLoraConfig(hidden_size=1, adapters=experts(GPT2), task_type="CAUSAL_LM"),
        )
    model: Any = get_peft_model(GPT2.build(), config(GPT2))
    moved(model)
    both: Any = GPT2.build()
    for name, folder in experts(GPT2).items():
        PeftModel.from_pretrained(both, folder, adapter_name=f"expert_{name}")
    both.set_adapter(["expert_0", "expert_1"])
    shape = (*IDS.shape, len(model.peft_config["default"].layers), 2)
    assert_close(logits(model, xlora_scalings=torch.ones(shape)), logits(both), 1e-5)
    assert (logits(model) - logits(both)).abs().max() > 1e-2


# what an adapted model offers


def test_a_model_has_pefts_methods_while_such_an_adapter_is_active() -> None:
    model, other = ours(), moved(theirs())
    for each in (model, other):
        assert each.get_latest_scalings() is None
        each.enable_scalings_logging()
        for length in (6, 3, 6):
            logits(each, IDS[:, :length])
        each.disable_scalings_logging()
        logits(each)
    ours_by_length, theirs_by_length = model.get_bucketed_scalings_log(), other.get_bucketed_scalings_log()
    assert {k: v[0] for k, v in ours_by_length.items()} == {k: v[0] for k, v in theirs_by_length.items()}
    for own, their in zip(model.get_scalings_log(), other.get_scalings_log(), strict=True):
        torch.testing.assert_close(own, their)
    for each in (model, other):
        each.clear_scalings_log()
        assert each.get_scalings_log() == []
        each.set_topk_lora(1)
        each.set_global_scaling_weight(2.5)
        each.set_scaling_pass_value(None)
        assert each.get_global_scaling_weight() == 2.5
    assert_close(logits(model), logits(other))
    assert model.peft_config["default"].scaling_pass_value == 0.5
    with pytest.raises(ValueError, match="top_k_lora is 3, for 2 experts"):
        model.set_topk_lora(3)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("lora")
    assert not hasattr(model, "set_topk_lora")
    assert not hasattr(get_peft_model(LLAMA.build(), LoraConfig(target_modules=["q_proj"])), "set_topk_lora")


def test_what_was_set_is_in_the_file_and_a_copy_logs_for_itself(tmp_path: Path) -> None:
    model = ours()
    model.set_topk_lora(1)
    model.set_global_scaling_weight(0.5)
    model.peft_config["default"].softmax_temperature = 2.0
    model.enable_scalings_logging()
    model.train()
    logits(model)
    copied = copy.deepcopy(model)
    assert len(model.get_scalings_log()) == 1
    assert copied.get_scalings_log() == []
    assert torch.equal(logits(copied), logits(model))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    options = ("top_k_lora", "global_scaling_weight", "softmax_temperature")
    assert tuple(saved[name] for name in options) == (1, 0.5, 2.0)


# the first run


def test_other_adapters_act_in_the_first_run() -> None:
    model = ours()
    model.add_adapter("lora", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    alone = logits(model) is not None and model.get_latest_scalings()
    model.set_adapter(["default", "lora"])
    logits(model)
    assert (model.get_latest_scalings() - alone).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(without_cache()))


def test_rows_of_a_batch_have_scalings_of_their_own_adapter() -> None:
    model = ours()
    turned = dict(zip("10", experts(LLAMA).values(), strict=True))
    model.add_adapter("second", config(LLAMA, adapters=turned, layerwise_scalings=True))
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    moved(model)
    alone = {}
    for name in ("default", "second", "lora"):
        model.set_adapter(name)
        alone[name] = logits(model)
    assert (alone["default"] - alone["second"]).abs().max() > 1e-2
    for names in (["default", "second"], ["second", "lora"], ["lora", "default"]):
        mixed = logits(model, adapter_names=names)
        assert_close(mixed, torch.stack([alone[name][row] for row, name in enumerate(names)]))
    mixed = logits(model, adapter_names=["__base__", "second"])
    assert_close(mixed, torch.stack([logits(without_cache())[0], alone["second"][1]]))
    given = {"max_new_tokens": 4, "do_sample": False}
    of_rows = model.generate(IDS, adapter_names=["lora", "second"], **given)
    model.set_adapter("second")
    assert torch.equal(of_rows[1], model.generate(IDS, **given)[1])


def test_a_call_may_fill_a_cache_and_none_goes_on_from_one() -> None:
    model = ours()
    expected = logits(model)
    found = model(input_ids=IDS, use_cache=True)
    assert torch.equal(found.logits, expected)
    assert found.past_key_values.get_seq_length() == IDS.shape[1]
    with pytest.raises(ValueError, match="needs all tokens, and this call goes on from those in a cache"):
        model(input_ids=IDS[:, :1], past_key_values=found.past_key_values)
    given = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS, **given)
    model.config.use_cache = model.generation_config.use_cache = True
    assert torch.equal(model.generate(IDS, **given), expected)
    beams = {"max_new_tokens": 5, "num_beams": 3}
    assert torch.equal(model.generate(IDS, **beams), moved(theirs()).generate(input_ids=IDS, **beams))
    # another adapter goes on from its cache
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("lora")
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(IDS, **given)
    assert lengths == [6, 1, 1, 1, 1]


def test_the_model_runs_twice_in_a_call_and_not_more() -> None:
    model = ours()
    runs: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    logits(model)
    assert runs == [False, True]
    model.forward(input_ids=IDS)
    assert runs == [False, True] * 2
    logits(model, xlora_scalings=model.get_latest_scalings())
    assert runs == [False, True] * 2 + [True]


def test_embeddings_checkpoints_and_compiled_code_give_the_same() -> None:
    model = ours(xlora_depth=2, xlora_size=5)
    expected = logits(model)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, expected)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS).logits, expected)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in classifier(model) if parameter.grad is not None]

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert len(plain) == 4
    for own, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(own, other)


def test_reentrant_checkpoints_which_would_go_through_the_classifier_for_each_layer_are_told() -> None:
    model = ours()
    expected = logits(model)
    model.train().activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant checkpoint can't give xlora_scalings its gradients"):
        model(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        assert_close(model.eval()(input_ids=IDS).logits, expected)


class Checkpointed(nn.Module):
    """Runs a module in a reentrant checkpoint."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return checkpoint(self.inner, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("part", ["head", "model"])
def test_reentrant_checkpoints_that_read_no_scalings_of_others_are_as_ever(part: str) -> None:
    model = ours().train()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def run(inputs: Any) -> Any:
        return model(inputs_embeds=inputs).logits

    run(embedded).sum().backward()
    expected = [parameter.grad for parameter in classifier(model)]
    model.zero_grad()
    if part == "head":
        model.lm_head = Checkpointed(model.lm_head)
        run(embedded).sum().backward()
    else:
        checkpoint(run, embedded, use_reentrant=True).sum().backward()
    for own, other in zip(classifier(model), expected, strict=True):
        torch.testing.assert_close(own.grad, other)


# the laws, and what is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [False, True])
def test_the_laws_hold(trains: bool, dtype: torch.dtype) -> None:
    own = config(TEXT, hidden_size=8, use_trainable_adapters=trains, layerwise_scalings=True)
    for law in (
        laws.assert_only_the_adapter_is_trained,
        laws.assert_adapted_is_base_with_delta,
        laws.assert_saved_is_loaded,
        laws.assert_dry_runs_change_nothing,
        assert_copies_stay_adapted,
        assert_two_adapters_act_together,
    ):
        law(lambda: TEXT.build().to(dtype), own, TEXT.inputs())


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_file_of_the_model_has_both_runs(format: str, tmp_path: Path) -> None:
    model = ours()
    inputs = {"input_ids": IDS, "return_dict": False}
    export(model, inputs, tmp_path / f"model.{format}", format=format, adapters="baked")
    with pytest.raises(graphpeft.ExportError, match="for each token"):
        export(model, inputs, tmp_path / f"model.{format}", format=format)


def test_values_are_exchanged() -> None:
    model, other = ours(), moved(get_peft_model(without_cache(), config(LLAMA)))
    for parameter in classifier(other):
        parameter.data.mul_(3)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(logits(model), logits(other))


def test_a_saved_adapter_is_swapped_and_has_experts_elsewhere(tmp_path: Path) -> None:
    model, other = ours(), ours()
    for parameter in classifier(other):
        parameter.data.mul_(3)
    other.save_pretrained(tmp_path / "adapter")
    hotswap_adapter(model, str(tmp_path / "adapter"), "default")
    assert torch.equal(logits(model), logits(other))
    edited = tmp_path / "adapter" / "adapter_config.json"
    edited.write_text(edited.read_text().replace(experts(LLAMA)["0"], str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"expert '0' of adapters: .*with the paths of the experts"):
        PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "adapter", config=config(LLAMA))
    assert torch.equal(logits(loaded), logits(other))


def test_no_weight_takes_it_in() -> None:
    with pytest.raises(AdaptError, match="no one weight does what it does"):
        ours().merge_adapter()
    assert torch.equal(logits(ours().unload()), logits(without_cache()))


MORE_THAN_PRODUCTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "a bias": {"lora_bias": True},
    "a module": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [1]},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", MORE_THAN_PRODUCTS.values(), ids=MORE_THAN_PRODUCTS)
def test_an_expert_that_is_more_than_products_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(LLAMA.build(), str(tmp_path), target_modules=["q_proj"], **options)
    model = LLAMA.build()
    with pytest.raises(AdaptError, match=r"expert '0', .*: it is more than products of A and B"):
        get_peft_model(model, XLoraConfig(adapters={"0": folder}))
    assert model.state_dict().keys() == LLAMA.build().state_dict().keys()


def test_other_layers_and_methods_are_refused(tmp_path: Path) -> None:
    activated = saved(LLAMA.build(), str(tmp_path / "a"), target_modules=["q_proj"], alora_invocation_tokens=[3])
    with pytest.raises(AdaptError, match="there LoRA's rule is Activated"):
        get_peft_model(LLAMA.build(), XLoraConfig(adapters={"0": activated}))
    weight = saved(LLAMA.build(), str(tmp_path / "w"), target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(AdaptError, match="a weight of its own"):
        get_peft_model(LLAMA.build(), XLoraConfig(adapters={"0": weight}))
    get_peft_model(LLAMA.build(), IA3Config()).save_pretrained(tmp_path / "ia3")
    with pytest.raises(AdaptError, match="is a IA3 adapter, and X-LoRA weighs those of LORA"):
        get_peft_model(LLAMA.build(), XLoraConfig(adapters={"0": str(tmp_path / "ia3")}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": ({"adapters": None}, "adapters has the names"),
    "other names": ({"adapters": {"math": "folder"}}, r"by the names '0', '1', …"),
    "too many": ({"top_k_lora": 3}, "top_k_lora is 3, for 2 experts"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdaptError, match=reason):
        get_peft_model(LLAMA.build(), config(LLAMA, **options))


def test_models_and_calls_that_cannot_be_are_refused() -> None:
    with pytest.raises(AdaptError, match="output_hidden_states=True, which Sequential doesn't take"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config(LLAMA))
    with pytest.raises(AdaptError, match="doesn't take"):
        get_peft_model(trace(LLAMA.build(), LLAMA.inputs()), config(LLAMA))
    model = ours()
    with pytest.raises(TypeError, match="xlora_scalings in each call"):
        model.get_decoder()(IDS)
    with pytest.raises(ValueError, match="pass one of them"):
        model()
    with pytest.raises(ValueError, match=r"scalings for \(2, 5\) rows and positions"):
        logits(model, xlora_scalings=torch.ones(2, 5, 9, 2))
    with pytest.raises(ValueError, match="hidden_size is 17"):
        logits(ours(hidden_size=17))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_in_half_precision_is_converted_with_its_experts(dtype: torch.dtype) -> None:
    model = moved(get_peft_model(without_cache().bfloat16(), config(LLAMA)))
    expected = logits(model).float()
    found = logits(copy.deepcopy(model).to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    assert (expected - logits(without_cache())).abs().max() > 0.1


# beside prompts


PROMPTS: dict[str, PeftConfig] = {
    "prompt tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
    "P-tuning": PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2, encoder_hidden_size=8),
    "a scope": PromptTuningConfig(num_virtual_tokens=2, prompt_scope=["model.layers.1"]),
}
BY_TOKEN: dict[str, Callable[[], PeftConfig]] = {
    "X-LoRA": lambda: config(LLAMA),
    "Shadow": lambda: ShadowConfig(task_type=TaskType.CAUSAL_LM, r=3, init_weights=False),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("method", BY_TOKEN)
def test_what_is_for_each_token_does_not_act_beside_a_prompt(method: str, prompt: PeftConfig) -> None:
    model = get_peft_model(LLAMA.build(), BY_TOKEN[method](), "own")
    model.add_adapter("prompt", copy.deepcopy(prompt))
    expected = logits(model, use_cache=False)
    before = laws.snapshot(model)
    for names in (["own", "prompt"], ["prompt", "own"]):
        with pytest.raises(
            AdaptError, match=r"'own', of .*, can't act beside another adapter: 'prompt' gives layers more"
        ):
            model.base_model.set_adapter(names)
        laws.require_unchanged(model, before, "what is refused")
    assert torch.equal(logits(model, use_cache=False), expected)


def test_experts_do_not_act_beside_tokens_in_their_attention() -> None:
    model = get_peft_model(LLAMA.build(), config(LLAMA), "own")
    model.add_adapter("prompt", AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    with pytest.raises(AdaptError, match="'prompt' gives projections of an attention its own tokens"):
        model.set_adapter(["own", "prompt"])


@pytest.mark.parametrize("method", BY_TOKEN)
def test_a_prefix_acts_beside_what_is_for_each_token(method: str) -> None:
    model = get_peft_model(LLAMA.build(), BY_TOKEN[method](), "own")
    model.add_adapter("kept", PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    alone = logits(model, use_cache=False)
    model.base_model.set_adapter(["own", "kept"])
    assert (logits(model, use_cache=False) - alone).abs().max() > 1e-3
    found = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    by_hand = IDS[:1]
    for _ in range(3):
        by_hand = torch.cat([by_hand, model(input_ids=by_hand, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, by_hand)
