"""An adapted model is the model that it was, for Transformers and for PyTorch: it only computes more."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from models import (
    BERT,
    CACHE,
    CUSTOM,
    EXAMPLES,
    FUNCTIONAL,
    GPT2,
    LLAMA,
    MLP,
    OPT,
    T5,
    VIT,
    VOCABULARY,
    Example,
    output,
)
from pairwise import pairwise
from safetensors.torch import load_file
from torch import Tensor, nn

import graphpeft
from graphpeft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from graphpeft.graph.paths import modules_by_path

pytestmark = pytest.mark.filterwarnings("ignore:::peft")

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)


def adapted(example: Example, **options: Any) -> Any:
    return get_peft_model(example.build(), example.config(init_lora_weights=False, **options))


def traced(example: Example, **options: Any) -> Any:
    graph = models.traced(example, example.build())
    return get_peft_model(graph, example.config(init_lora_weights=False, **options))


# the model is the same object


@each_example
def test_adapting_gives_back_the_same_object_of_the_same_class(example: Example) -> None:
    model = example.build()
    modules = dict(model.named_modules())
    classes = {path: type(module) for path, module in modules.items()}
    result = get_peft_model(model, example.config())
    assert result is model
    assert isinstance(result, PeftModel)
    assert modules_by_path(result) == modules
    for path, module in modules.items():
        assert isinstance(module, classes[path])
        assert type(module).__name__ == classes[path].__name__


@each_example
def test_base_weights_keep_their_names_and_their_tensors(example: Example) -> None:
    model = example.build()
    before = model.state_dict(keep_vars=True)
    get_peft_model(model, example.config(bias="all"))
    after = model.state_dict(keep_vars=True)
    assert [name for name in after if name in before] == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())


@each_example
def test_a_fresh_adapter_changes_no_bit_of_the_outputs(example: Example) -> None:
    model = example.build()
    before = output(model, example.inputs())
    assert torch.equal(output(get_peft_model(model, example.config()), example.inputs()), before)


def with_dropout(example: Example) -> nn.Module:
    """Builds a model that drops wherever it can."""
    model = example.build()
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "attn_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.2)
    return model


def state_of_both_modes(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Returns the outputs of training and then of evaluation, and the buffers, which training changes."""
    # PyTorch computes an attention in another way when its weights are frozen, as adapting does
    model.requires_grad_(False)
    torch.manual_seed(0)
    outputs = {f"training={mode}": output(model.train(mode), inputs) for mode in (True, False)}
    return outputs | dict(model.named_buffers())


@pytest.mark.parametrize("as_graph", [False, True], ids=["as-it-is", "traced"])
@each_example
def test_training_and_evaluation_are_those_of_the_base(example: Example, as_graph: bool) -> None:
    expected = state_of_both_modes(with_dropout(example), example.inputs())
    model = with_dropout(example)
    model = models.traced(example, model) if as_graph else model
    found = state_of_both_modes(get_peft_model(model, example.config()), example.inputs())
    # a graph holds only those buffers that it reads
    assert expected.keys() == found.keys() or as_graph
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@each_example
def test_a_disabled_adapter_leaves_the_base(example: Example) -> None:
    model = adapted(example)
    inputs = example.inputs()
    base, with_adapter = output(example.build(), inputs), output(model, inputs)
    assert not torch.equal(with_adapter, base)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), base)
    assert torch.equal(output(model, inputs), with_adapter)


def test_an_error_while_it_is_disabled_leaves_the_adapter_on() -> None:
    model = adapted(LLAMA)
    before = output(model, LLAMA.inputs())
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(output(model, LLAMA.inputs()), before)


@pytest.mark.parametrize("build", [adapted, traced])
@each_example
def test_unloading_gives_back_the_very_model(example: Example, build: Callable[..., Any]) -> None:
    base = example.build() if build is adapted else models.traced(example, example.build())
    model = build(example, bias="lora_only")
    model.add_adapter("other", example.config(r=2))
    unloaded = model.unload()
    assert unloaded is model
    assert not isinstance(unloaded, PeftModel)
    assert list(unloaded.state_dict()) == list(base.state_dict())
    assert [vars(module).keys() for module in unloaded.modules()] == [vars(module).keys() for module in base.modules()]
    if build is adapted:
        assert [type(module) for module in unloaded.modules()] == [type(module) for module in base.modules()]
    assert all(parameter.requires_grad for parameter in unloaded.parameters())
    assert torch.equal(output(unloaded, example.inputs()), output(base, example.inputs()))


@pytest.mark.parametrize("build", [adapted, traced])
@each_example
def test_a_merged_model_is_a_base_model_with_the_adapters_outputs(example: Example, build: Callable[..., Any]) -> None:
    model = build(example, lora_alpha=4)
    expected = output(model, example.inputs())
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not any("lora" in name for name in merged.state_dict())
    difference = (output(merged, example.inputs()) - expected).abs().max()
    assert difference <= 1e-5 * max(1, expected.abs().max())


def test_what_was_frozen_before_is_frozen_after_unloading() -> None:
    model = LLAMA.build()
    model.get_submodule("model.layers.0").requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    get_peft_model(model, LLAMA.config(bias="all")).unload()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


# counts


def opt_350m() -> nn.Module:
    """Builds the architecture of facebook/opt-350m on the meta device."""
    config = transformers.OPTConfig(
        hidden_size=1024,
        word_embed_proj_dim=512,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        do_layer_norm_before=False,
    )
    with torch.device("meta"):
        return transformers.OPTForCausalLM(config)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_opt_350m_counts_its_parameters_as_peft_does(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = opt_350m()
    if device == "cpu":
        model = model.to_empty(device="cpu")
        model.tie_weights()
    options: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 1,572,864 || all params: 332,769,280 || trainable%: 0.4727\n"
    assert {parameter.device.type for parameter in model.parameters()} == {device}


@each_example
def test_exactly_the_adapter_is_trained(example: Example) -> None:
    model = adapted(example)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == set(model.state_dict()) - set(example.build().state_dict())
    count = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    assert model.get_nb_trainable_parameters() == (count, sum(p.numel() for p in model.parameters()))


# generation


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("example", [LLAMA, OPT, GPT2, T5], ids=str)
def test_it_generates_what_pefts_model_generates(example: Example, beams: int) -> None:
    ours = adapted(example, lora_alpha=64)
    theirs = peft.get_peft_model(example.build(), peft.LoraConfig(**example.lora, lora_alpha=64)).eval()
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    prompt = example.inputs()["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    generated = ours.generate(input_ids=prompt, **options)
    assert torch.equal(generated, theirs.generate(input_ids=prompt, **options))
    assert not torch.equal(generated, example.build().generate(input_ids=prompt, **options))  # type: ignore[operator]


# Trainer


class Rows(torch.utils.data.Dataset):
    """Sequences of tokens that a causal language model is to continue."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(6) * (index + 3) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.05,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],
        "seed": 0,
    }
    return transformers.Trainer(model, transformers.TrainingArguments(**arguments | options), train_dataset=Rows())


def trainable(**options: Any) -> Any:
    return get_peft_model(LLAMA.build(), LLAMA.config(lora_dropout=0.1, **options))


def test_trainer_trains_the_adapter_and_nothing_else_and_its_checkpoints_hold_it_alone(tmp_path: Path) -> None:
    model = trainable()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert trainer_of(model, tmp_path, logging_steps=1).train().training_loss > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora" in name), name
    tensors = get_peft_model_state_dict(model)
    checkpoint = tmp_path / "checkpoint-4"
    weights = [*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*model*.bin")]
    assert checkpoint / "adapter_model.safetensors" in weights
    for file in weights:
        assert sorted(load_file(file)) == sorted(tensors), file
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(tensors)
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), checkpoint).eval()
    torch.testing.assert_close(output(loaded, LLAMA.inputs()), output(model.eval(), LLAMA.inputs()))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "modules-to-save"])
def test_training_that_resumes_from_a_checkpoint_ends_where_it_would_have_ended(
    options: dict[str, Any], tmp_path: Path
) -> None:
    uninterrupted = trainable(**options)
    trainer_of(uninterrupted, tmp_path).train()
    (tmp_path / "checkpoint-4").rename(tmp_path / "done")
    resumed = trainable(**options)
    trainer = trainer_of(resumed, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    expected = get_peft_model_state_dict(uninterrupted)
    for key, tensor in get_peft_model_state_dict(resumed).items():
        torch.testing.assert_close(tensor, expected[key], msg=lambda m, key=key: f"{key}: {m}")


def test_training_of_a_prompt_resumes_with_its_encoder(tmp_path: Path) -> None:
    def prompted() -> Any:
        torch.manual_seed(0)
        config = PromptEncoderConfig(
            task_type=graphpeft.TaskType.CAUSAL_LM, num_virtual_tokens=4, encoder_hidden_size=8
        )
        return get_peft_model(LLAMA.build(), config)

    through, resumed = prompted(), prompted()
    first = prompted().state_dict()
    trainer_of(through, tmp_path).train()
    trainer_of(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    changed = [name for name, tensor in through.state_dict().items() if not torch.equal(tensor, first[name])]
    assert all(name.startswith("prompt_encoder.default.") for name in changed)
    assert changed
    assert all(torch.equal(tensor, through.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_an_adapted_model_is_saved_by_trainer_as_an_adapter(tmp_path: Path) -> None:
    model = trainable()
    trainer_of(model, tmp_path / "runs", save_strategy="no").save_model(str(tmp_path / "saved"))
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {"model.safetensors", "config.json"} & names


# gradient checkpointing


def gradients(model: Any, example: Example) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    inputs = example.inputs()
    torch.manual_seed(0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pairwise(example=[LLAMA, OPT], enabled_first=[True, False], use_reentrant=[True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    example: Example, enabled_first: bool, use_reentrant: bool
) -> None:
    options = {"lora_dropout": 0.1}
    expected = gradients(adapted(example, **options), example)
    model: Any = example.build()
    kwargs = {"use_reentrant": use_reentrant}
    if enabled_first:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    torch.manual_seed(0)
    get_peft_model(model, example.config(init_lora_weights=False, **options))
    if not enabled_first:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    graphpeft.set_peft_model_state_dict(model, get_peft_model_state_dict(adapted(example, **options)))
    assert model.is_gradient_checkpointing
    found = gradients(model, example)
    assert len(expected) == len(get_peft_model_state_dict(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
@pytest.mark.parametrize("is_of_all", [True, False], ids=["in all layers", "in the last layer"])
@pytest.mark.parametrize("example", [LLAMA, OPT], ids=str)
def test_a_prefix_whose_cache_is_switched_off_later_is_told(example: Example, is_of_all: bool) -> None:
    config = PrefixTuningConfig(task_type=graphpeft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = get_peft_model(example.build(), config)
    expected = gradients(model, example)
    model.gradient_checkpointing_enable()
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    for layer in () if is_of_all else layers[:-1]:
        layer.gradient_checkpointing = False
    with pytest.raises(RuntimeError, match=r"which gradient checkpointing switches off: call gradient_checkpointing_d"):
        gradients(model, example)
    model.eval()(**example.inputs())
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(gradients(model, example), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_")
def test_a_prefix_of_a_decoder_that_checkpoints_all_its_layers_itself_is_told_of_it() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "n_inner": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any = transformers.ClvpForCausalLM(transformers.ClvpDecoderConfig(vocab_size=64, **sizes)).train()
    get_peft_model(model, PrefixTuningConfig(task_type=graphpeft.TaskType.CAUSAL_LM, num_virtual_tokens=2))
    tokens = torch.randint(3, 60, (2, 5))
    assert model(tokens).logits.isfinite().all()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="which gradient checkpointing switches off"):
        model(tokens)


# copies


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pairwise(
    example=[LLAMA, BERT, VIT, MLP, FUNCTIONAL, CUSTOM],
    build={"adapted": adapted, "traced": traced},
    duplicate={"deepcopy": copy.deepcopy, "by_pickle": by_pickle, "by_torch": by_torch},
)
def test_a_copy_is_adapted_and_on_its_own(
    example: Example, build: Callable[..., Any], duplicate: Callable[[Any], Any]
) -> None:
    model = build(example, bias="lora_only")
    expected = output(model, example.inputs())
    copied = duplicate(model)
    assert type(copied) is type(model) or type(copied).__name__ == type(model).__name__
    assert isinstance(copied, PeftModel)
    assert torch.equal(output(copied, example.inputs()), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.add_adapter("other", example.config())
    copied.unload()
    assert torch.equal(output(model, example.inputs()), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, example.inputs()), output(example.build(), example.inputs()))


@pytest.mark.parametrize("example", [LLAMA, VIT, MLP, FUNCTIONAL, CUSTOM], ids=str)
def test_replicas_of_data_parallel_compute_the_same(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(example.build(), example.config(init_lora_weights=False, bias="all"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("default.bias"):
                parameter.add_(1)

    def copies(tensors: list[Tensor], devices: list[int], detach: bool) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    # the CPU takes what would be sent to other devices
    replicating = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, optional: device)
    for replica in torch.nn.parallel.replicate(model, [0, 1]):
        assert torch.equal(output(replica, example.inputs()), output(model, example.inputs()))


@each_example
def test_a_state_dict_goes_into_another_adapted_model(example: Example) -> None:
    model = adapted(example, bias="lora_only")
    torch.manual_seed(9)
    other = adapted(example, bias="lora_only")
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(output(other, example.inputs()), output(model, example.inputs()))


def test_a_base_state_dict_goes_into_an_adapted_model() -> None:
    other_base = LLAMA.build(seed=5)
    model = get_peft_model(LLAMA.build(), LLAMA.config())
    result = model.load_state_dict(other_base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("lora" in key for key in result.missing_keys)
    assert torch.equal(output(model, LLAMA.inputs()), output(other_base, LLAMA.inputs()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("example", [LLAMA, BERT], ids=str)
def test_a_model_in_another_dtype_stays_adapted(example: Example, dtype: torch.dtype) -> None:
    model = adapted(example).to(dtype)
    result = output(model, example.inputs())
    assert result.dtype == dtype
    with model.disable_adapter():
        assert (output(model, example.inputs()) - result).abs().max() > 1e-3


# compilers


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("example", [LLAMA, MLP, FUNCTIONAL], ids=str)
def test_it_compiles_into_one_graph(example: Example, training: bool) -> None:
    torch.compiler.reset()
    model = adapted(example).train(training)
    inputs = example.inputs()
    expected = output(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler warns of is its own
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(output(compiled, inputs), expected)


# traced


@pytest.mark.parametrize("example", [e for e in (LLAMA, GPT2, OPT) if e not in models.UNTRACED], ids=str)
def test_a_decoder_that_is_traced_with_a_cache_decodes_as_the_model_does(example: Example) -> None:
    model: Any = example.build()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))

    def step(called: Any, cache: Any, place: int) -> Tensor:
        return called(input_ids=ids[:, place : place + 1], use_cache=True, **{CACHE: cache}).logits

    def cache_of_four() -> Any:
        return model(input_ids=ids[:, :4], use_cache=True).past_key_values

    given = cache_of_four()
    traced = graphpeft.trace(model, {"input_ids": ids[:, 4:5], CACHE: given, "use_cache": True}, strict=True)
    # the example is as it was
    assert given.get_seq_length() == 4
    caches = cache_of_four(), cache_of_four()
    for place in range(4, 9):
        found, expected = step(traced, caches[0], place), step(model, caches[1], place)
        assert (found - expected).abs().max() < 1e-6
    assert caches[0].get_seq_length() == 9


def test_an_adapted_model_that_is_traced_is_adapted_again_as_the_model_is() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(LLAMA.build(), config)
    traced: Any = graphpeft.trace(adapted, LLAMA.inputs())
    assert torch.equal(output(traced, LLAMA.inputs()), output(adapted, LLAMA.inputs()))
    get_peft_model(traced, config, "second")
    expected = get_peft_model_state_dict(adapted)
    assert get_peft_model_state_dict(traced, adapter_name="second").keys() == expected.keys()
