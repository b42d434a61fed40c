"""sentence-transformers: models of sentences, pairs and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import sentence_transformers
import tiny
import torch
import transformers
from loops import adapted, close
from sentence_transformers import SentenceTransformer, losses, models
from workflow import Values, workflow

TOOL = "sentence-transformers"
SENTENCES = ["a cat", "the dog runs", "stars at night"]
PAIRS = {"anchor": SENTENCES * 2, "positive": ["one cat", "a dog ran", "a night of stars"] * 2}


@workflow(TOOL, "the Transformer inside is adapted, and trained with MultipleNegativesRankingLoss")
def ranking(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, folder)
    values = _trained(model, losses.MultipleNegativesRankingLoss(model), PAIRS, folder)
    return {**values, "embeddings": _summed(model)}


@workflow(TOOL, "CosineSimilarityLoss, with the adapter saved and loaded onto a base")
def cosine(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, folder)
    rows = {"first": SENTENCES, "second": SENTENCES[::-1], "score": [0.1, 1.0, 0.3]}
    values = _trained(model, losses.CosineSimilarityLoss(model), rows, folder)
    model[0].model.save_pretrained(str(folder / "adapter"))
    other = _sentences(folder)
    other[0].model = peft.PeftModel.from_pretrained(other[0].model, str(folder / "adapter"))
    close(_embedded(other), _embedded(model))
    return values


@workflow(TOOL, "CachedMultipleNegativesRankingLoss and MatryoshkaLoss")
def cached(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, folder)
    inner = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    return _trained(model, losses.MatryoshkaLoss(model, inner, [16, 8]), PAIRS, folder)


@workflow(TOOL, "an adapter is merged, the model of sentences saved whole, and loaded")
def merged(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, folder)
    expected = _embedded(model)
    model[0].model = model[0].model.merge_and_unload()
    close(_embedded(model), expected)
    model.save(str(folder / "whole"))
    close(_embedded(SentenceTransformer(str(folder / "whole"), device="cpu")), expected)
    return {"embeddings": _summed(model)}


@workflow(TOOL, "an adapter's folder is loaded by SentenceTransformer's load_adapter")
def loaded(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, folder)
    model[0].model.save_pretrained(str(folder / "adapter"))
    other = _sentences(folder)
    other.load_adapter(str(folder / "adapter"))
    close(_embedded(other), _embedded(model))
    return {"embeddings": _summed(other)}


@workflow(TOOL, "prompts, and similarities of encoded queries and documents")
def similarities(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, folder)
    model.prompts = {"query": "find "}
    queries = model.encode(SENTENCES, prompt_name="query", convert_to_tensor=True)
    found = model.similarity(queries, _embedded(model))
    return {"similarities": found.flatten().tolist()}


@workflow(TOOL, "a CrossEncoder is adapted and trained")
def cross_encoder(peft: Any, folder: Path) -> Values:
    _transformer(transformers.BertForSequenceClassification, folder, num_labels=1)
    model = sentence_transformers.CrossEncoder(str(folder / "base"), device="cpu", num_labels=1)
    model[0].model = adapted(
        peft, model[0].model, "query", "value", modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    loss = sentence_transformers.cross_encoder.losses.BinaryCrossEntropyLoss(model)
    rows = {"first": SENTENCES, "second": SENTENCES[::-1], "label": [0.0, 1.0, 0.0]}
    arguments = sentence_transformers.cross_encoder.CrossEncoderTrainingArguments(**_settings(folder))
    trainer = sentence_transformers.cross_encoder.CrossEncoderTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict(rows), loss=loss
    )
    trainer.train()
    scores = model.predict([("a cat", "the cat"), ("a dog", "stars")], convert_to_numpy=True)
    return {**_losses(trainer), "scores": [float(score) for score in scores]}


def _transformer(cls: Any, folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(tiny.LETTERS), pad_token_id=0, **size, **options)
    cls(config).save_pretrained(str(folder / "base"))
    tiny.tokenizer().save_pretrained(str(folder / "base"))


def _sentences(folder: Path) -> Any:
    if not (folder / "base").exists():
        _transformer(transformers.BertModel, folder)
    inner = models.Transformer(str(folder / "base"))
    return SentenceTransformer(modules=[inner, models.Pooling(16)], device="cpu")


def _adapted(peft: Any, folder: Path) -> Any:
    model = _sentences(folder)
    model[0].model = adapted(peft, model[0].model, "query", "value", task_type="FEATURE_EXTRACTION")
    return model


def _settings(folder: Path) -> dict[str, Any]:
    settings = {"output_dir": str(folder / "run"), "max_steps": 3, "per_device_train_batch_size": 3, "use_cpu": True}
    return settings | {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "learning_rate": 0.02, "bf16": False}


def _trained(model: Any, loss: Any, rows: dict[str, Any], folder: Path) -> Values:
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(**_settings(folder))
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict(rows), loss=loss
    )
    trainer.train()
    return _losses(trainer)


def _losses(trainer: Any) -> Values:
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def _embedded(model: Any) -> Any:
    return model.encode(SENTENCES, convert_to_tensor=True)


def _summed(model: Any) -> float:
    return _embedded(model).square().sum().item() + _embedded(model).sum().item()
