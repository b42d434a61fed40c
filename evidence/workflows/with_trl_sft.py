"""trl's SFTTrainer, in the modes that people use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
import transformers
import trl
from trl_training import COMPLETIONS, TEXTS, adapted, lora, losses, trained, trainer
from workflow import Values, workflow

CHATS = [
    {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you there"}]},
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} {% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


@workflow("trl", "SFT")
def sft(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", adapted(peft), TEXTS, folder))}


@workflow(
    "trl",
    "SFT: the trainer is given a base and peft_config=",
    apart="trl calls PEFT's own get_peft_model: pass an adapted model, model=get_peft_model(base, config)",
)
def config_of_trainer(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", tiny.llama(), TEXTS, folder, peft_config=lora(peft)))}


@workflow("trl", "SFT: packed rows of several texts")
def packed(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", adapted(peft), TEXTS, folder, packing=True, max_length=32))}


@workflow("trl", "SFT: the loss of completions alone")
def completions(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", adapted(peft), COMPLETIONS, folder, completion_only_loss=True))}


@workflow("trl", "SFT: the loss of the assistant's turns alone")
def assistant(peft: Any, folder: Path) -> Values:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    options = {"processing_class": tokenizer, "assistant_only_loss": True}
    return {"losses": losses(trained("SFT", adapted(peft), CHATS, folder, **options))}


@workflow("trl", "SFT: gradient checkpointing off, accumulation on")
def accumulated(peft: Any, folder: Path) -> Values:
    options = {"gradient_checkpointing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return {"losses": losses(trained("SFT", adapted(peft), TEXTS, folder, **options))}


@workflow("trl", "SFT: re-entrant gradient checkpointing")
def reentrant(peft: Any, folder: Path) -> Values:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return {"losses": losses(trained("SFT", adapted(peft), TEXTS, folder, **options))}


@workflow("trl", "SFT: resumed from a checkpoint")
def resumed(peft: Any, folder: Path) -> Values:
    trained("SFT", adapted(peft), TEXTS, folder, max_steps=2, save_steps=2)
    further = trainer("SFT", adapted(peft), TEXTS, folder, max_steps=4, save_steps=4)
    further.train(resume_from_checkpoint=True)
    assert further.state.global_step == 4
    assert (folder / "checkpoint-4" / "adapter_model.safetensors").exists()
    return {"losses": losses(further)}


@workflow("trl", "SFT: bf16, as by default")
def half(peft: Any, folder: Path) -> Values:
    trainer = trained("SFT", adapted(peft, tiny.llama().bfloat16()), TEXTS, folder, bf16=True)
    kinds = {str(parameter.dtype) for parameter in trainer.model.parameters() if parameter.requires_grad}
    return {"losses": losses(trainer), "kinds": sorted(kinds)}


@workflow("trl", "SFT: NEFTune")
def neftune(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", adapted(peft), TEXTS, folder, neftune_noise_alpha=5.0))}


@workflow("trl", "SFT: dropout in the adapter")
def dropout(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", adapted(peft, lora_dropout=0.3), TEXTS, folder))}


@workflow("trl", "SFT: all linear layers, DoRA, the head fully trained")
def dora(peft: Any, folder: Path) -> Values:
    options = {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["lm_head"]}
    trainer = trained("SFT", adapted(peft, **options), TEXTS, folder)
    head = peft.get_peft_model_state_dict(trainer.model)["base_model.model.lm_head.weight"]
    assert not torch.equal(head, tiny.llama().lm_head.weight)
    return {"losses": losses(trainer), "head": head.sum().item()}


@workflow("trl", "SFT: LoRA at the head, whose weight trl reads")
def at_the_head(peft: Any, folder: Path) -> Values:
    trainer = trained("SFT", adapted(peft, target_modules=["q_proj", "lm_head"]), TEXTS, folder)
    head = peft.get_peft_model_state_dict(trainer.model)["base_model.model.lm_head.lora_B.weight"]
    assert head.any(), "the loss doesn't see the adapter"
    return {"losses": losses(trainer), "head": head.sum().item()}


@workflow("trl", "SFT: prompt tuning")
def prompt_tuning(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return {"losses": losses(trained("SFT", peft.get_peft_model(tiny.llama(), config), TEXTS, folder))}


@workflow("trl", "SFT: P-tuning")
def p_tuning(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    return {"losses": losses(trained("SFT", peft.get_peft_model(tiny.llama(), config), TEXTS, folder))}


@workflow("trl", "SFT: prefix tuning")
def prefix_tuning(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny.llama(), config)
    return {"losses": losses(trained("SFT", model, TEXTS, folder, gradient_checkpointing=False))}


@workflow("trl", "SFT: new tokens, whose rows are trained")
def new_tokens(peft: Any, folder: Path) -> Values:
    rows = {"trainable_token_indices": {"embed_tokens": [3, 4]}}
    trainer = trained("SFT", adapted(peft, **rows), TEXTS, folder)
    keys = [key for key in peft.get_peft_model_state_dict(trainer.model) if "token" in key]
    return {"losses": losses(trainer), "keys": sorted(keys)}


@workflow("trl", "SFT: on four bits (QLoRA)")
def four_bits(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(folder / "base")
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=bits)
    model = adapted(peft, peft.prepare_model_for_kbit_training(base))
    return {"losses": losses(trained("SFT", model, TEXTS, folder))}


@workflow("trl", "SFT: the second of two adapters is trained, the first stays as it was")
def two_adapters(peft: Any, folder: Path) -> Values:
    model = adapted(peft)
    model.add_adapter("second", lora(peft, r=2))
    model.set_adapter("second")
    before = {name: each.clone() for name, each in peft.get_peft_model_state_dict(model).items()}
    trainer = trained("SFT", model, TEXTS, folder)
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, before[name])
    assert (folder / "checkpoint-3" / "second" / "adapter_model.safetensors").exists()
    return {"losses": losses(trainer)}


@workflow("trl", "SFT: the checkpoint by AutoPeftModel, merged, saved and loaded as a model of its own")
def merged(peft: Any, folder: Path) -> Values:
    tiny.llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    trained("SFT", adapted(peft, base), TEXTS, folder)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "checkpoint-3")
    tokens = torch.arange(3, 9)[None]
    expected = loaded(input_ids=tokens).logits
    loaded.merge_and_unload().save_pretrained(folder / "merged")
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(alone(input_ids=tokens).logits, expected)
    return {"logits": expected.sum().item(), "files": sorted(os.listdir(folder / "merged"))}


@workflow("trl", "SFT: merged in the trainer's hands, called, generated with and saved")
def merged_at_once(peft: Any, folder: Path) -> Values:
    model = trained("SFT", adapted(peft), TEXTS, folder).model.merge_and_unload().eval()
    tokens = tiny.tokenizer()(["abc"], return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**tokens, max_new_tokens=5, do_sample=False)
    model.save_pretrained(folder / "merged")
    alone = type(model).from_pretrained(folder / "merged")
    torch.testing.assert_close(alone(**tokens).logits, model(**tokens).logits)
    return {"tokens": written.tolist(), "logits": alone(**tokens).logits.sum().item()}


@workflow("trl", "SFT: the dynamic loss (DFT) on experts")
def dft(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("SFT", adapted(peft, tiny.mixtral()), TEXTS, folder, loss_type="dft"))}


@workflow("trl", "SFT: selective checkpointing of activations")
def selective(peft: Any, folder: Path) -> Values:
    options = {"gradient_checkpointing_kwargs": {"selective": True}}
    return {"losses": losses(trained("SFT", adapted(peft), TEXTS, folder, **options))}


@workflow("trl", "SFT: evaluated and saved by the trainer, texts generated")
def evaluated(peft: Any, folder: Path) -> Values:
    trainer = trained("SFT", adapted(peft), TEXTS, folder, eval_dataset=datasets.Dataset.from_list(TEXTS))
    found = trainer.evaluate()
    trainer.save_model(str(folder / "saved"))
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder / "saved"))
    tokens = tiny.tokenizer()(["abc"], return_tensors="pt")
    texts = [
        model.generate(**tokens, max_new_tokens=5, do_sample=False)[0].tolist()
        for model in (trainer.model.eval(), loaded)
    ]
    assert texts[0] == texts[1]
    names = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")
    return {"found": {name: found[name] for name in names}, "texts": texts}


@workflow("trl", "SFT: options by ModelConfig and get_peft_config, as in trl's scripts")
def scripts(peft: Any, folder: Path) -> Values:
    arguments = trl.ModelConfig(use_peft=True, lora_r=4, lora_alpha=6, lora_target_modules=["q_proj", "v_proj"])
    theirs = trl.get_peft_config(arguments)
    options = {name: getattr(theirs, name) for name in ("r", "lora_alpha", "lora_dropout", "bias", "task_type")}
    model = adapted(peft, **options)
    return {"losses": losses(trained("SFT", model, TEXTS, folder))}
