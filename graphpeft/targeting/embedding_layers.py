"""The embeddings of a Transformers model, whose own tables an adapter's file may hold beside the adapter.

This serves vocabularies that were resized after the base model was saved: no other file has the new rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphpeft.graph.traced_model import TracedModel, module_told
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.config import PeftConfig
from graphpeft.targeting import targets
from graphpeft.targeting.targets import Match
from graphpeft.wording import shortened

_NAMES = ("embed_tokens", "lm_head")
"""PEFT's `EMBEDDING_LAYER_NAMES`: an embedding that is a target by one of these names has its table saved."""


def embedding_layers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the paths of the model's input and output embeddings, from its getters."""
    model: Any = modules[""]
    if isinstance(model, TracedModel):
        return [path for path in modules if path in (model.input_embedding, model.output_head)]
    # a user's model may have only one of the getters
    told = (module_told(model, name) for name in ("get_input_embeddings", "get_output_embeddings"))
    layers = [layer for layer in told if layer is not None]
    return [path for path, module in modules.items() if any(module is layer for layer in layers)]


def input_embedding(modules: Mapping[str, nn.Module]) -> str | None:
    """Returns the path of the model's input embedding, from its getter; None without one."""
    model: Any = modules[""]
    if isinstance(model, TracedModel):
        return model.input_embedding
    layer = module_told(model, "get_input_embeddings")
    return next((path for path, module in modules.items() if module is layer), None)


def are_untied(model: nn.Module) -> bool:
    """Returns whether a Transformers model's config says that its embeddings are no other layer's weight, too."""
    return getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False


def to_save(
    modules: Mapping[str, nn.Module], config: PeftConfig, base: str | None, setting: bool | str, has_rows: bool
) -> list[str]:
    """Returns the paths of the embeddings whose own tensors are saved beside an adapter."""
    if setting not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers must be True, False or 'auto', not {setting!r}")
    layers = embedding_layers(modules)
    if setting is True and not layers:
        raise ValueError(
            f"save_embedding_layers=True, but a {type(modules['']).__name__} has no get_input_embeddings to tell which "
            "they are; leave it 'auto', and name an embedding that you train in modules_to_save"
        )
    targeted = _are_targeted(config, modules) if layers else False
    if setting == "auto" and layers:
        setting = (targeted and not has_rows) or _is_resized(modules[""], base)
    if setting is not True:
        return []
    decide = targets.compile_matcher(config.target_options)
    return [path for path in layers if not targeted or decide(path) is Match.YES]


def _are_targeted(config: PeftConfig, modules: Mapping[str, nn.Module]) -> bool:
    wanted = config.target_options.target_modules
    if not isinstance(wanted, str):
        return any(name in _NAMES for name in wanted or ())
    decide = targets.compile_matcher(config.target_options)
    return any(path.rpartition(".")[2] in _NAMES and decide(path) is Match.YES for path in modules)


def _is_resized(model: Any, base: str | None) -> bool:
    """Returns whether the model's vocabulary differs in size from the base model's."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not size or not base:
        return False
    try:
        before = type(model.config).from_pretrained(base)
    except (OSError, ValueError):
        warnings.warn(
            f"the config of {shortened(base)} can't be read, so that its embeddings are saved only if "
            "save_embedding_layers=True",
            PeftWarning,
            stacklevel=4,
        )
        return False
    return getattr(before, "vocab_size", size) != size
