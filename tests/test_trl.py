"""trl's trainers train a model of this library as they train PEFT's: to the same losses, against the same reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import graphpeft

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]

LETTERS = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}

PAIRS = [
    {"prompt": "abc", "chosen": " def", "rejected": " xyz"},
    {"prompt": "hi", "chosen": " you", "rejected": " me"},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "SFT": [{"text": "abc def ghi"}, {"text": "some words here"}],
    "DPO": PAIRS,
    "KTO": [
        {"prompt": "abc", "completion": " def", "label": True},
        {"prompt": "hi", "completion": " me", "label": False},
    ],
    "Reward": [{"chosen": "abc def", "rejected": "abc xyz"}, {"chosen": "hi you", "rejected": "hi me"}],
    "GRPO": [{"prompt": "abc"}, {"prompt": "hello there"}],
    "RLOO": [{"prompt": "abc"}, {"prompt": "hello there"}],
}


def tokenizer() -> Any:
    """Returns one that has a token for each letter."""
    letters: Any = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **named)


def base(kind: str) -> Any:
    torch.manual_seed(0)
    cls = transformers.LlamaForSequenceClassification if kind == "Reward" else transformers.LlamaForCausalLM
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    options: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "num_labels": 1}
    return cls(transformers.LlamaConfig(vocab_size=len(LETTERS), **size, **options))


def config(library: Any, kind: str) -> Any:
    # its changes are felt from the first step on
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return library.LoraConfig(task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM", **options)


def adapted(library: Any, kind: str) -> Any:
    model = base(kind)
    torch.manual_seed(1)
    return library.get_peft_model(model, config(library, kind))


def trainer(kind: str, model: Any, folder: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": [],
        "seed": 5,
    }
    arguments |= {name: options.pop(name) for name in ("gradient_checkpointing",) if name in options}
    if kind in ("GRPO", "RLOO"):
        arguments |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
        options["reward_funcs"] = lambda completions, **_: [float(len(text) % 3) for text in completions]
    settings = getattr(trl, f"{kind}Config")(**arguments)
    rows = datasets.Dataset.from_list(ROWS[kind] * 4)
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer(), **options
    )


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ROWS)
def test_a_trainer_trains_a_model_as_pefts(kind: str, tmp_path: Path) -> None:
    found = {}
    for library in (peft, graphpeft):
        training = trainer(kind, adapted(library, kind), tmp_path / library.__name__)
        torch.manual_seed(9)
        training.train()
        found[library] = losses(training)
    assert len(found[graphpeft]) == 3
    torch.testing.assert_close(found[graphpeft], found[peft], rtol=1e-4, atol=1e-6)
    checkpoint = tmp_path / "graphpeft" / "checkpoint-3"
    theirs = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "peft" / "checkpoint-3"))
    ours = peft.PeftModel.from_pretrained(base(kind), str(checkpoint))
    expected = peft.get_peft_model_state_dict(theirs)
    for name, tensor in peft.get_peft_model_state_dict(ours).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_the_reference_is_the_policy_at_the_start_and_no_second_base(kind: str, tmp_path: Path) -> None:
    model = adapted(graphpeft, kind)
    training = trainer(kind, model, tmp_path)
    assert training.model is model
    assert getattr(training, "ref_model", None) is None
    assert list(model.peft_config) == ["default", "ref"]
    named = dict(model.named_parameters())
    of_policy = [name for name in named if ".default." in name]
    assert len(of_policy) == 8
    for name in of_policy:
        assert torch.equal(named[name.replace(".default.", ".ref.")], named[name])
    training.train()
    if kind == "DPO":
        assert losses(training)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert any(not torch.equal(named[name.replace(".default.", ".ref.")], named[name]) for name in of_policy)


def test_trained_rows_are_the_references_too(tmp_path: Path) -> None:
    model: Any = graphpeft.get_peft_model(
        base("DPO"), graphpeft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4, 9])
    )
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_delta
    torch.nn.init.normal_(rows["default"])
    training = trainer("DPO", model, tmp_path)
    assert torch.equal(rows["ref"], rows["default"])
    before = rows["ref"].clone()
    training.train()
    assert losses(training)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(rows["ref"], before)
    assert not torch.equal(rows["ref"], rows["default"])


PROMPTS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {},
    "PromptEncoderConfig": {"encoder_hidden_size": 8},
    "PrefixTuningConfig": {},
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO"])
def test_a_prompt_is_trained_as_pefts_and_is_its_own_reference(kind: str, name: str, tmp_path: Path) -> None:
    found = []
    for library in (peft, graphpeft):
        model = base(kind)
        torch.manual_seed(1)
        prompt = getattr(library, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **PROMPTS[name])
        # a prefix works through the cache, which checkpointing switches off
        options = {"gradient_checkpointing": False}
        training = trainer(kind, library.get_peft_model(model, prompt), tmp_path / library.__name__, **options)
        torch.manual_seed(9)
        training.train()
        found.append(losses(training))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    if kind == "DPO":
        assert found[1][0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_config_for_a_trainer_says_that_it_takes_a_model(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"adapt the model by graphpeft\.get_peft_model"):
        trainer("SFT", base("SFT"), tmp_path, peft_config=config(graphpeft, "SFT"))


def test_a_trainer_that_switches_dropout_off_switches_the_adapters_off(tmp_path: Path) -> None:
    options: Any = {"r": 4, "lora_dropout": 0.5, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    model: Any = graphpeft.get_peft_model(base("DPO"), graphpeft.LoraConfig(**options))
    training = trainer("DPO", model, tmp_path)
    training.train()
    # the policy is the reference at first
    assert losses(training)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_model_that_one_trainer_has_had_goes_to_the_next_with_another_adapter(tmp_path: Path) -> None:
    model = adapted(graphpeft, "SFT")
    trainer("SFT", model, tmp_path / "sft").train()
    model.add_adapter("other", config(graphpeft, "DPO"))
    model.save_pretrained(tmp_path / "saved")
    model.load_adapter(tmp_path / "saved", "loaded")
    training = trainer("DPO", model, tmp_path / "dpo")
    training.train()
    assert losses(training)[0] == pytest.approx(math.log(2), abs=1e-6)
