"""trl's trainers that generate while they train: GRPO, RLOO, and distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from trl_training import PROMPTS, adapted, lengths, losses, prompted, trained, trainer
from workflow import Values, workflow

ROLLOUTS = {"num_generations": 2, "max_completion_length": 6, "reward_funcs": lengths}


@workflow("trl", "GRPO: against the adapter at the start")
def grpo(peft: Any, folder: Path) -> Values:
    trainer = trained("GRPO", adapted(peft), PROMPTS, folder, **ROLLOUTS, beta=0.1)
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(divergences[0]) < 1e-6
    return {"losses": losses(trainer), "divergences": divergences, "adapters": sorted(trainer.model.peft_config)}


@workflow("trl", "GRPO: without a reference")
def grpo_free(peft: Any, folder: Path) -> Values:
    trainer = trained("GRPO", adapted(peft), PROMPTS, folder, **ROLLOUTS)
    assert list(trainer.model.peft_config) == ["default"]
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"losses": losses(trainer), "rewards": rewards}


@workflow("trl", "GRPO: several updates for each generation, DAPO's loss, two rewards")
def grpo_iterated(peft: Any, folder: Path) -> Values:
    rewards = [lengths, lambda completions, **_: [text.count("a") / 2 for text in completions]]
    options = {"num_iterations": 2, "loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True}
    options |= ROLLOUTS | {"reward_funcs": rewards, "beta": 0.05}
    return {"losses": losses(trained("GRPO", adapted(peft), PROMPTS, folder, **options))}


@workflow("trl", "GRPO: rewards by an adapted model with a score")
def grpo_scored(peft: Any, folder: Path) -> Values:
    judge = tiny.llama(transformers.LlamaForSequenceClassification, num_labels=1)
    judge = adapted(peft, judge, task_type="SEQ_CLS").merge_and_unload()
    options = ROLLOUTS | {"reward_funcs": judge, "reward_processing_classes": tiny.tokenizer()}
    trainer = trained("GRPO", adapted(peft), PROMPTS, folder, **options)
    return {
        "losses": losses(trainer),
        "rewards": [each["reward"] for each in trainer.state.log_history if "reward" in each],
    }


@workflow("trl", "GRPO: resumed from a checkpoint")
def grpo_resumed(peft: Any, folder: Path) -> Values:
    trained("GRPO", adapted(peft), PROMPTS, folder, **ROLLOUTS, beta=0.1, max_steps=2, save_steps=2)
    further = trainer("GRPO", adapted(peft), PROMPTS, folder, **ROLLOUTS, beta=0.1, max_steps=3)
    torch.manual_seed(9)
    further.train(resume_from_checkpoint=True)
    return {"losses": losses(further)}


@workflow("trl", "GRPO: DoRA, the head fully trained")
def grpo_head(peft: Any, folder: Path) -> Values:
    model = adapted(peft, use_dora=True, modules_to_save=["lm_head"])
    return {"losses": losses(trained("GRPO", model, PROMPTS, folder, **ROLLOUTS, beta=0.1))}


@workflow("trl", "GRPO: a prompt")
def grpo_prompt(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("GRPO", prompted(peft), PROMPTS, folder, **ROLLOUTS))}


@workflow("trl", "GMPO (experimental)")
def gmpo(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("GMPO", adapted(peft), PROMPTS, folder, **ROLLOUTS))}


@workflow("trl", "RLOO: against the adapter at the start")
def rloo(peft: Any, folder: Path) -> Values:
    return {"losses": losses(trained("RLOO", adapted(peft), PROMPTS, folder, **ROLLOUTS, beta=0.1))}


@workflow("trl", "RLOO: without a reference, advantages normalised")
def rloo_free(peft: Any, folder: Path) -> Values:
    options = ROLLOUTS | {"beta": 0.0, "normalize_advantages": True}
    return {"losses": losses(trained("RLOO", adapted(peft), PROMPTS, folder, **options))}


@workflow("trl", "GKD (experimental): distilled from a teacher, partly on own texts")
def gkd(peft: Any, folder: Path) -> Values:
    rows = [{"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]}]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    options = {"teacher_model": tiny.llama(), "processing_class": tokenizer, "lmbda": 0.5, "max_new_tokens": 4}
    torch.manual_seed(3)
    return {"losses": losses(trained("GKD", adapted(peft), rows, folder, **options))}


@workflow("trl", "Online DPO (experimental): pairs that the policy writes and a reward ranks")
def online_dpo(peft: Any, folder: Path) -> Values:
    options = {"reward_funcs": lengths, "max_new_tokens": 4}
    return {"losses": losses(trained("OnlineDPO", adapted(peft), PROMPTS, folder, **options))}
