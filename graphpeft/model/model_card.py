"""The model card of an adapter, `README.md` in its folder, which the Hub shows; its metadata have PEFT's names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from graphpeft.adapters.base_names import base_name
from graphpeft.adapters.state import Adapter
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.traced_model import stands_for
from graphpeft.rules.peft_names import PEFT_VERSION, PeftType, TaskType
from graphpeft.rules.plain_values import plain
from graphpeft.rules.registry import registered
from graphpeft.wording import shortened

CARD_NAME = "README.md"

_BASE_TAG = "base_model:adapter:"


def model_card(model: nn.Module, adapters: Sequence[Adapter], file: Path) -> str:
    """Returns the text of the card of adapters: the one that is there, completed, or a new one."""
    from huggingface_hub import ModelCard, ModelCardData

    methods = list(dict.fromkeys(adapter.config.method for adapter in adapters))
    are_of_peft = all(method in list(PeftType) for method in methods)
    # a file that isn't there may still be a broken link, which is replaced
    card: Any = (
        _read(file) if file.exists() else ModelCard.from_template(ModelCardData(), model_summary=_summary(methods))
    )
    named = (base_name(model, adapter.config) for adapter in adapters) if _is_on_a_hub(model) else ()
    base = next(filter(None, named), None)
    card.data.library_name = "peft" if are_of_peft else "graphpeft"
    card.data.base_model = base or card.data.base_model
    card.data.tags = _with_tags(card.data.tags or [], model, methods, base)
    if not card.data.pipeline_tag and any(adapter.config.task_type == TaskType.CAUSAL_LM for adapter in adapters):
        card.data.pipeline_tag = "text-generation"
    if are_of_peft:
        card.text = _with_version(card.text)
    return str(card)


def _is_on_a_hub(model: nn.Module) -> bool:
    """Returns whether the name of a base model can be one on the Hub, as PEFT decides it: models there have a config.

    A card with any other name has metadata that the Hub refuses.
    """
    return hasattr(model, "config") or _is_of_transformers(model)


def _is_of_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and issubclass(stands_for(model), transformers.PreTrainedModel)


def _read(file: Path) -> Any:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard.load(file)
    except (ValueError, TypeError, YAMLError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise CheckpointError(f"{file} isn't a model card that can be completed: {reason}; mend or move it") from error


def _summary(methods: Sequence[str]) -> str:
    of_peft, others = ([m for m in methods if (m in list(PeftType)) == is_of_peft] for is_of_peft in (True, False))
    sentences = [f"A {method} adapter, saved by graphpeft in the format of Hugging Face PEFT." for method in of_peft]
    alone = "which alone can load it: PEFT has no such method."
    return " ".join([*sentences, *(f"A {method} adapter, saved by graphpeft, {alone}" for method in others)])


def _with_tags(tags: Sequence[Any], model: nn.Module, methods: Sequence[str], base: str | None) -> list[Any]:
    """Returns a card's tags with those of adapters, and without those of other methods and of another base model."""
    own = {*(getattr(model, "model_tags", None) or ()), *(method.lower() for method in methods)}
    if _is_of_transformers(model):
        own.add("transformers")
    if base is not None:
        own.add(f"{_BASE_TAG}{base}")
    methods_of_others = {plain(method).lower() for method in registered()} - own
    bases = (_BASE_TAG,) if base is not None else ()
    kept = [tag for tag in tags if str(tag) not in own | methods_of_others and not str(tag).startswith(bases)]
    return [*kept, *sorted(own)]


def _with_version(text: str) -> str:
    """Returns a card's text with the version of PEFT in whose format the adapters are."""
    heading, line = "### Framework versions", f"- PEFT {PEFT_VERSION}"
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(end)
    if line in lines:
        return text
    if heading not in lines:
        return end.join([text.rstrip(), "", heading, "", line, ""])
    lines.insert(lines.index(heading) + 2, line)
    return end.join(lines)
