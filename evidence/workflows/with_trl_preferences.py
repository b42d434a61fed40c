"""trl's trainers on preferences: DPO, KTO, rewards, and those that need no reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
import transformers
from trl_training import ANSWERS, JUDGED, PAIRS, adapted, losses, prompted, trained, trainer
from workflow import Values, workflow


@workflow("trl", "DPO: the reference is the adapter at the start, so that the first loss is ln 2")
def dpo(peft: Any, folder: Path) -> Values:
    trainer = trained("DPO", adapted(peft), PAIRS, folder)
    found = losses(trainer)
    assert abs(found[0] - math.log(2)) < 1e-6
    assert getattr(trainer, "ref_model", None) is None
    return {"losses": found, "adapters": sorted(trainer.model.peft_config)}


@workflow("trl", "DPO: a fresh adapter, whose reference is the base")
def dpo_fresh(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("DPO", adapted(peft, init_lora_weights=True), PAIRS, folder))}


@workflow("trl", "DPO: an explicit reference model")
def dpo_reference(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("DPO", adapted(peft), PAIRS, folder, ref_model=tiny.llama()))}


@workflow("trl", "DPO: the reference's log-probabilities computed before")
def dpo_precomputed(peft: Any, folder: Path) -> Values:
    found = losses(trained("DPO", adapted(peft), PAIRS, folder, precompute_ref_log_probs=True))
    assert abs(found[0] - math.log(2)) < 1e-6
    return {"losses": found}


@workflow("trl", "DPO: several losses, weighted")
def dpo_losses(peft: Any, folder: Path) -> Values:
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    return {"losses": losses(trained("DPO", adapted(peft), PAIRS, folder, **options))}


@workflow("trl", "DPO: without padding, IPO, gradient accumulation")
def dpo_ipo(peft: Any, folder: Path) -> Values:
    options = {"loss_type": ["ipo"], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return {"losses": losses(trained("DPO", adapted(peft), PAIRS, folder, **options))}


@workflow("trl", "DPO: evaluated against the reference")
def dpo_evaluated(peft: Any, folder: Path) -> Values:
    rows = datasets.Dataset.from_list(PAIRS)
    found = trained("DPO", adapted(peft), PAIRS, folder, eval_dataset=rows).evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")}


@workflow("trl", "DPO: the policy's file after training, and no reference in it")
def dpo_saved(peft: Any, folder: Path) -> Values:
    trained("DPO", adapted(peft), PAIRS, folder)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder / "checkpoint-3"))
    assert list(loaded.peft_config) == ["default"]
    return {"logits": loaded(input_ids=torch.arange(3, 9)[None]).logits.sum().item()}


@workflow("trl", "DPO: resumed from a checkpoint")
def dpo_resumed(peft: Any, folder: Path) -> Values:
    trained("DPO", adapted(peft), PAIRS, folder, max_steps=2, save_steps=2)
    further = trainer("DPO", adapted(peft), PAIRS, folder, max_steps=4, save_steps=4)
    further.train(resume_from_checkpoint=True)
    return {"losses": losses(further)}


@workflow("trl", "DPO: of experts' stacked weights (target_parameters)")
def dpo_experts(peft: Any, folder: Path) -> Values:
    model = adapted(peft, tiny.mixtral(), target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    return {"losses": losses(trained("DPO", model, PAIRS, folder))}


@workflow("trl", "DPO: a prompt, whose reference is the prompt at the start")
def dpo_prompt(peft: Any, folder: Path) -> Values:
    found = losses(trained("DPO", prompted(peft), PAIRS, folder))
    assert abs(found[0] - math.log(2)) < 1e-6
    return {"losses": found}


@workflow("trl", "DPO: rows of the embedding are trained, and DoRA")
def dpo_rows(peft: Any, folder: Path) -> Values:
    model = adapted(peft, trainable_token_indices=[4, 5], use_dora=True)
    return {"losses": losses(trained("DPO", model, PAIRS, folder))}


@workflow("trl", "DPO: biases are trained, too")
def dpo_biases(peft: Any, folder: Path) -> Values:
    model = adapted(peft, tiny.llama(attention_bias=True), bias="lora_only")
    return {"losses": losses(trained("DPO", model, PAIRS, folder))}


@workflow("trl", "KTO")
def kto(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("KTO", adapted(peft), JUDGED, folder))}


@workflow("trl", "KTO: APO, the reference's log-probabilities computed before")
def kto_precomputed(peft: Any, folder: Path) -> Values:
    options = {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}
    return {"losses": losses(trained("KTO", adapted(peft), JUDGED, folder, **options))}


@workflow("trl", "KTO: a prompt")
def kto_prompt(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("KTO", prompted(peft), JUDGED, folder))}


@workflow("trl", "Reward: a model with a score")
def reward(peft: Any, folder: Path) -> Values:
    base = tiny.llama(transformers.LlamaForSequenceClassification, num_labels=1)
    trainer = trained("Reward", adapted(peft, base, task_type="SEQ_CLS"), ANSWERS, folder)
    keys = [key for key in peft.get_peft_model_state_dict(trainer.model) if "score" in key]
    return {"losses": losses(trainer), "keys": keys}


@workflow("trl", "Reward: centred rewards, evaluated, then scores of texts")
def reward_centred(peft: Any, folder: Path) -> Values:
    base = tiny.llama(transformers.LlamaForSequenceClassification, num_labels=1)
    options = {"center_rewards_coefficient": 0.01, "eval_dataset": datasets.Dataset.from_list(ANSWERS)}
    trainer = trained("Reward", adapted(peft, base, task_type="SEQ_CLS"), ANSWERS, folder, **options)
    accuracy = trainer.evaluate()["eval_accuracy"]
    fresh = tiny.llama(transformers.LlamaForSequenceClassification, num_labels=1)
    loaded = peft.PeftModel.from_pretrained(fresh, str(folder / "checkpoint-3"))
    texts = tiny.tokenizer()(["abc def", "hi me"], padding=True, return_tensors="pt")
    return {"accuracy": accuracy, "scores": loaded(**texts).logits.flatten().tolist()}


@workflow("trl", "Reward: a prompt, and a trained score")
def reward_prompt(peft: Any, folder: Path) -> Values:
    base = tiny.llama(transformers.LlamaForSequenceClassification, num_labels=1)
    return {"losses": losses(trained("Reward", prompted(peft, base, "SEQ_CLS"), ANSWERS, folder))}


@workflow("trl", "TPO (experimental): preferences beside a reference text")
def tpo(peft: Any, folder: Path) -> Values:
    rows = [{**row, "reference": row["chosen"]} for row in PAIRS]
    return {"losses": losses(trained("TPO", adapted(peft), rows, folder))}


@workflow("trl", "ORPO (experimental)")
def orpo(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("ORPO", adapted(peft), PAIRS, folder, max_length=32))}


@workflow("trl", "CPO (experimental)")
def cpo(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("CPO", adapted(peft), PAIRS, folder, max_length=32))}
