"""Transformers' Trainer with a causal model, in the modes that people use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from trainer_runs import adapted, losses, texts, trained, trainer
from workflow import Values, part, workflow

TOKENS = torch.arange(3, 9)[None]


@workflow("transformers: Trainer", "a causal model; checkpoints hold the adapter alone")
def causal(peft: Any, folder: Path) -> Values:
    trainer = trained(adapted(peft), folder)
    size = sum(os.path.getsize(folder / "checkpoint-3" / name) for name in os.listdir(folder / "checkpoint-3"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in peft.load_peft_weights(
        str(folder / "checkpoint-3")
    )
    assert size < 200_000
    return {"losses": losses(trainer)}


@workflow("transformers: Trainer", "resumed from a checkpoint, with the optimizer")
def resumed(peft: Any, folder: Path) -> Values:
    trained(adapted(peft), folder, max_steps=2, save_steps=2)
    further = trainer(adapted(peft), folder, max_steps=4, save_steps=4)
    further.train(resume_from_checkpoint=True)
    return {"losses": losses(further)}


@workflow("transformers: Trainer", "resumed with a trained head, rows of the embedding and biases")
def resumed_whole(peft: Any, folder: Path) -> Values:
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4], "use_dora": True}
    trained(adapted(peft, **options), folder, max_steps=2, save_steps=2)
    further = trainer(adapted(peft, **options), folder, max_steps=4, save_steps=4)
    further.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"losses": losses(further)}


@workflow("transformers: Trainer", "the best checkpoint is loaded at the end; early stopping")
def best(peft: Any, folder: Path) -> Values:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "eval_loss", "learning_rate": 1.0, "max_steps": 6, "eval_dataset": texts(4)}
    options |= {"callbacks": [transformers.EarlyStoppingCallback(2)]}
    trainer = trained(adapted(peft), folder, **options)
    found = trainer.evaluate()["eval_loss"]
    assert abs(found - trainer.state.best_metric) < 1e-5
    return {"best": trainer.state.best_global_step, "steps": trainer.state.global_step, "loss": found}


@workflow("transformers: Trainer", "label smoothing")
def smoothed(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained(adapted(peft), folder, label_smoothing_factor=0.1))}


@workflow("transformers: Trainer", "NEFTune, which leaves the embedding as it was")
def neftune(peft: Any, folder: Path) -> Values:
    trainer = trained(adapted(peft), folder, neftune_noise_alpha=5.0)
    trainer.model.eval()
    return {"losses": losses(trainer), "logits": trainer.model(input_ids=TOKENS).logits.sum().item()}


@workflow("transformers: Trainer", "gradient checkpointing, re-entrant")
def reentrant(peft: Any, folder: Path) -> Values:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return {"losses": losses(trained(adapted(peft), folder, **options))}


@workflow("transformers: Trainer", "gradient checkpointing, not re-entrant, with dropout")
def checkpointed(peft: Any, folder: Path) -> Values:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {"losses": losses(trained(adapted(peft, lora_dropout=0.3), folder, **options))}


@workflow("transformers: Trainer", "gradient accumulation, clipping, a schedule")
def accumulated(peft: Any, folder: Path) -> Values:
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    trainer = trained(adapted(peft), folder, per_device_train_batch_size=2, **options)
    return {"losses": losses(trainer), "norms": [each["grad_norm"] for each in trainer.state.log_history[:-1]]}


@workflow("transformers: Trainer", "bf16")
def half(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained(adapted(peft), folder, bf16=True))}


@workflow("transformers: Trainer", "a base in bfloat16, whose adapter is in float32")
def half_base(peft: Any, folder: Path) -> Values:
    trainer = trained(adapted(peft, tiny.llama().bfloat16()), folder, bf16=True, learning_rate=0.001)
    kinds = {str(each.dtype) for each in trainer.model.parameters() if each.requires_grad}
    return {"losses": losses(trainer), "kinds": sorted(kinds)}


@workflow("transformers: Trainer", "compiled by torch_compile")
def compiled(peft: Any, folder: Path) -> Values:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    return {"losses": losses(trained(adapted(peft), folder, **options))}


@workflow("transformers: Trainer", "metrics, evaluation and prediction")
def metrics(peft: Any, folder: Path) -> Values:
    def right(found: Any) -> dict[str, float]:
        return {"right": float((found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:]).mean())}

    trainer = trained(adapted(peft), folder, eval_dataset=texts(4), compute_metrics=right)
    predicted = trainer.predict(texts(2))
    return {"right": trainer.evaluate()["eval_right"], "logits": float(predicted.predictions.sum())}


@workflow("transformers: Trainer", "Adafactor")
def adafactor(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained(adapted(peft), folder, optim="adafactor"))}


@workflow("transformers: Trainer", "8-bit AdamW")
def adamw_bits(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained(adapted(peft), folder, optim="adamw_8bit"))}


@workflow("transformers: Trainer", "an optimizer of PEFT's, LoRA+")
def loraplus(peft: Any, folder: Path) -> Values:
    model = adapted(peft)
    make = part(peft, "optimizers.create_loraplus_optimizer")
    optimizer = make(model, optimizer_cls=torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0)
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    return {"losses": losses(trained(model, folder, optimizers=(optimizer, None))), "rates": rates}


@workflow("transformers: Trainer", "an optimizer of PEFT's, LoRA-FA, which leaves A as it was")
def lorafa(peft: Any, folder: Path) -> Values:
    model = adapted(peft)
    make = part(peft, "optimizers.create_lorafa_optimizer")
    optimizer = make(model, r=4, lora_alpha=6, lr=0.01)
    before = {name: each.clone() for name, each in peft.get_peft_model_state_dict(model).items() if "lora_A" in name}
    trainer = trained(model, folder, optimizers=(optimizer, None))
    after = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    return {"losses": losses(trainer)}


@workflow("transformers: Trainer", "a model made anew by model_init")
def model_init(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained(None, folder, model_init=lambda: adapted(peft)))}


@workflow("transformers: Trainer", "rows of different lengths, in groups and padded")
def grouped(peft: Any, folder: Path) -> Values:
    rows = texts(8)
    for index, row in enumerate(rows.rows):
        rows.rows[index] = {"input_ids": row["input_ids"][: 2 + index % 4]}
    collate = transformers.DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
    options = {"train_sampling_strategy": "group_by_length", "data_collator": collate}
    return {"losses": losses(trained(adapted(peft), folder, rows, **options))}


@workflow("transformers: Trainer", "a batch size that is found by trying")
def found_size(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained(adapted(peft), folder, auto_find_batch_size=True))}


@workflow("transformers: Trainer", "callbacks see the adapted model at each step")
def callbacks(peft: Any, folder: Path) -> Values:
    norms: list[float] = []

    class Norms(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            norms.append(sum(each.norm().item() for name, each in model.named_parameters() if "lora_B" in name))

    trained(adapted(peft), folder, callbacks=[Norms()])
    return {"norms": norms}


@workflow("transformers: Trainer", "experts' stacked weights (target_parameters) and routers")
def experts(peft: Any, folder: Path) -> Values:
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    trainer = trained(adapted(peft, tiny.mixtral(), **targets), folder)
    fresh = peft.PeftModel.from_pretrained(tiny.mixtral(), str(folder / "checkpoint-3"))
    return {"losses": losses(trainer), "logits": fresh(input_ids=TOKENS).logits.sum().item()}


@workflow("transformers: Trainer", "a prompt (P-tuning), evaluated at each step")
def prompt(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    model = peft.get_peft_model(tiny.llama(), config)
    trainer = trained(
        model, folder, eval_dataset=texts(4), eval_strategy="steps", eval_steps=1, prediction_loss_only=True
    )
    evaluated = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
    return {"losses": losses(trainer), "evaluated": evaluated}


@workflow("transformers: Trainer", "a prefix, loaded and evaluated")
def prefix(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = trained(peft.get_peft_model(tiny.llama(), config), folder)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder / "checkpoint-3"))
    return {
        "losses": losses(trainer),
        "logits": loaded(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits.sum().item(),
    }
