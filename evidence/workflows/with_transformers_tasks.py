"""Transformers' Trainer with models of all kinds: one's own, for classification, speech, and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from torch import nn
from trainer_runs import Rows, losses, trained, trainer
from workflow import Values, workflow

TOOL = "transformers: Trainer"
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Own(nn.Module):
    """A model of a user's, which knows nothing of Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Any, labels: Any = None) -> Any:
        """Returns logits, and the loss if there are labels."""
        logits = self.head(self.body(x))
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def own(peft: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["body.0", "body.2"], modules_to_save=["head"])
    return peft.get_peft_model(Own(), config)


def numbers(count: int = 8) -> Rows:
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(2))
    return Rows([{"x": row, "labels": torch.tensor(index % 3)} for index, row in enumerate(drawn)])


@workflow(TOOL, "a model of one's own; checkpoints hold the adapter alone, and PeftModel loads them")
def own_model(peft: Any, folder: Path) -> Values:
    trainer = trained(own(peft), folder, numbers())
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Own(), str(folder / "checkpoint-3"))
    keys = sorted(peft.load_peft_weights(str(folder / "checkpoint-3")))
    return {"losses": losses(trainer), "logits": loaded(torch.ones(1, 4))["logits"].sum().item(), "keys": keys}


@workflow(TOOL, "a model of one's own: resumed, the best one loaded at the end")
def own_resumed(peft: Any, folder: Path) -> Values:
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"label_names": ["labels"], "eval_dataset": numbers(4)}
    trained(own(peft), folder, numbers(), max_steps=2, **options)
    further = trainer(own(peft), folder, numbers(), max_steps=4, **options)
    further.train(resume_from_checkpoint=True)
    found = further.evaluate()["eval_loss"]
    assert abs(found - further.state.best_metric) < 1e-6
    return {"losses": losses(further), "best": found}


@workflow(TOOL, "sequences classified; the head is trained and saved, since the task is told")
def sequences(peft: Any, folder: Path) -> Values:
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"], lora_dropout=0.1
    )

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    rows = [{"input_ids": row, "labels": torch.tensor(index % 3)} for index, row in enumerate(_tokens())]
    options = {"eval_dataset": Rows(rows), "compute_metrics": accuracy}
    trainer = trained(_bert(peft, "SequenceClassification", config, num_labels=3), folder, Rows(rows), **options)
    keys = sorted(key for key in peft.get_peft_model_state_dict(trainer.model) if "classifier" in key)
    return {"losses": losses(trainer), "accuracy": trainer.evaluate()["eval_accuracy"], "keys": keys}


@workflow(TOOL, "tokens classified; all linear layers but the head, and all biases")
def tokens(peft: Any, folder: Path) -> Values:
    config = peft.LoraConfig(
        task_type="TOKEN_CLS",
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        bias="all",
        exclude_modules=["classifier"],
    )
    rows = Rows([{"input_ids": row, "labels": row % 3} for row in _tokens()])
    trainer = trained(_bert(peft, "TokenClassification", config, num_labels=3), folder, rows)
    return {
        "losses": losses(trainer),
        "trained": sum(each.numel() for each in trainer.model.parameters() if each.requires_grad),
    }


@workflow(TOOL, "answers found in texts")
def answers(peft: Any, folder: Path) -> Values:
    config = peft.LoraConfig(task_type="QUESTION_ANS", r=4, lora_alpha=6, target_modules=["query", "value"])
    rows = Rows(
        [{"input_ids": row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(3)} for row in _tokens()]
    )
    return {"losses": losses(trained(_bert(peft, "QuestionAnswering", config), folder, rows))}


@workflow(TOOL, "masked words, with DoRA")
def masked(peft: Any, folder: Path) -> Values:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "word_embeddings"], use_dora=True)
    rows = Rows([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in _tokens()])
    collate = transformers.DataCollatorForLanguageModeling(_masking(), seed=1)
    return {"losses": losses(trained(_bert(peft, "MaskedLM", config), folder, rows, data_collator=collate))}


@workflow(TOOL, "Seq2SeqTrainer with predict_with_generate")
def seq2seq(peft: Any, folder: Path) -> Values:
    def length(found: Any) -> dict[str, float]:
        return {"tokens": float(np.where(found.predictions >= 0, found.predictions, 0).sum())}

    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=6, target_modules=["q", "v"])
    rows = Rows([{"input_ids": row, "labels": row[:4]} for row in _tokens()])
    options = {"predict_with_generate": True, "generation_max_length": 5, "generation_num_beams": 2}
    options |= {"eval_dataset": rows, "compute_metrics": length}
    trainer = trained(peft.get_peft_model(tiny.t5(), config), folder, rows, **options)
    return {"losses": losses(trainer), "tokens": trainer.evaluate()["eval_tokens"]}


@workflow(TOOL, "an encoder-decoder with a prefix, then generated")
def prefix_pair(peft: Any, folder: Path) -> Values:
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    rows = Rows([{"input_ids": row, "labels": row[:4]} for row in _tokens()])
    return {"losses": losses(trained(peft.get_peft_model(tiny.t5(), config), folder, rows))}


@workflow(TOOL, "images classified by a ViT with a new head")
def images(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**BERT, image_size=8, patch_size=4, num_labels=3)
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(transformers.ViTForImageClassification(config), lora)
    pictures = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    rows = Rows([{"pixel_values": each, "labels": torch.tensor(index % 3)} for index, each in enumerate(pictures)])
    return {"losses": losses(trained(model, folder, rows, remove_unused_columns=False))}


@workflow(TOOL, "speech recognised by Whisper")
def whisper(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8, "vocab_size": 30}
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = transformers.WhisperConfig(**sizes, **layers, encoder_ffn_dim=16, decoder_ffn_dim=16, **special)
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    model = peft.get_peft_model(transformers.WhisperForConditionalGeneration(config), lora)
    sounds = torch.randn(8, 4, 16, generator=torch.Generator().manual_seed(2))
    rows = Rows([{"input_features": each, "labels": torch.arange(3, 7)} for each in sounds])
    # as in PEFT's example of a model with a forward of its own
    options = {"remove_unused_columns": False, "label_names": ["labels"]}
    trainer = trained(model, folder, rows, **options)
    written = trainer.model.eval().generate(input_features=sounds[:2], max_new_tokens=3)
    return {"losses": losses(trainer), "tokens": written.tolist()}


@workflow(TOOL, "speech recognised by wav2vec 2, whose front is frozen (CTC)")
def wav2vec(peft: Any, folder: Path) -> Values:
    torch.manual_seed(0)
    convolutions = {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(**BERT, **convolutions, **positions, vocab_size=30, mask_time_prob=0.0)
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    base = transformers.Wav2Vec2ForCTC(config)
    base.freeze_feature_encoder()
    model = peft.get_peft_model(base, lora)
    sounds = torch.randn(8, 160, generator=torch.Generator().manual_seed(2))
    rows = Rows([{"input_values": each, "labels": torch.arange(3, 7)} for each in sounds])
    return {"losses": losses(trained(model, folder, rows, remove_unused_columns=False))}


@workflow(TOOL, "images and text (Llava): the language model's layers alone, by a pattern")
def llava(peft: Any, folder: Path) -> Values:
    model = peft.get_peft_model(
        tiny.llava(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q|v)_proj")
    )
    pictures = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([*[29] * 4, 5, 6, 7, 8])
    rows = Rows(
        [
            {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": each, "labels": tokens}
            for each in pictures
        ]
    )
    trainer = trained(model, folder, rows, remove_unused_columns=False)
    assert not any("vision" in key for key in peft.get_peft_model_state_dict(model))
    return {"losses": losses(trainer)}


def _tokens() -> torch.Tensor:
    return torch.randint(3, len(tiny.LETTERS), (8, 6), generator=torch.Generator().manual_seed(2))


def _masking() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = "z"
    return tokenizer


def _bert(peft: Any, task: str, config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = transformers.BertConfig(**BERT, vocab_size=len(tiny.LETTERS), **options)
    return peft.get_peft_model(getattr(transformers, f"BertFor{task}")(sizes), config)
