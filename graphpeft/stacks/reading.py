"""Reads a saved adapter for a model: from the files of any stack, and by the model's own names."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import modules_by_path
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.rules.peft_names import PEFT_VERSION, PeftType
from graphpeft.stacks.peft_files import PREFIX, SavedAdapter, load, read, with_those_beside
from graphpeft.targeting.patterns import Pattern


def read_for(
    model: nn.Module | None,
    model_id: str | os.PathLike[str],
    config: ConfigLike | None = None,
    use_safetensors: bool | None = None,
    hub_options: Mapping[str, Any] = MappingProxyType({}),
    key_mapping: Mapping[str, str] | None = None,
    served_base: str | os.PathLike[str] | None = None,
) -> SavedAdapter:
    """Returns a saved adapter, in the files of any stack, by the names of a model; None takes the names as they are."""
    if config is None:
        try:
            saved = read(model_id, use_safetensors=use_safetensors, **hub_options)
        except (OSError, CheckpointError):
            other = _of_other_stack(model, Path(model_id, hub_options.get("subfolder") or ""), served_base)
            if other is None:
                raise
            saved = other
    else:
        values, given = load(model_id, use_safetensors=use_safetensors, **hub_options), as_config(config)
        values = with_those_beside(given, values, model_id, use_safetensors, hub_options)
        saved = SavedAdapter(given, values, of_version=_version_beside(model_id, use_safetensors, hub_options))
    if key_mapping:
        saved = saved._replace(tensors=renamed(saved.tensors, key_mapping))
    # most files are by this version
    if model is not None and vars(saved.config).get("target_parameters") and saved.of_version != PEFT_VERSION:
        saved = _with_stacks_as_now(model, saved)
    loaded: Any = sys.modules.get("transformers.modeling_utils")
    if model is None or loaded is None or not isinstance(model, loaded.PreTrainedModel):
        return saved
    return _by_names_of(model, saved)


def _version_beside(
    model_id: str | os.PathLike[str], use_safetensors: bool | None, hub_options: Mapping[str, Any]
) -> str | None:
    """Returns the version of PEFT that the config beside a file names, whatever config is given for it."""
    try:
        return read(model_id, use_safetensors=use_safetensors, **hub_options).of_version
    except (OSError, CheckpointError):
        return None


def _of_other_stack(
    model: nn.Module | None, path: Path, served_base: str | os.PathLike[str] | None
) -> SavedAdapter | None:
    from graphpeft.stacks.known import recognised  # which no file of PEFT's needs

    stack = recognised(path)
    if stack is None or (reader := stack.beside(served_base).read) is None:
        return None
    files = reader(path, model)
    return SavedAdapter(PeftConfig.from_dict(files.config), dict(files.tensors))


def _with_stacks_as_now(model: nn.Module, saved: SavedAdapter) -> SavedAdapter:
    """Returns an adapter with the factors of stacks as PEFT has them now, if an earlier version has saved it."""
    from graphpeft.stacks.adapter_files import AdapterFiles
    from graphpeft.stacks.older_peft import as_since_0_19

    if saved.config.method != PeftType.LORA:
        return saved
    files = AdapterFiles(saved.config.to_dict(), saved.tensors)
    return saved._replace(tensors=dict(as_since_0_19(files, saved.of_version, modules_by_path(model)).tensors))


def _by_names_of(model: nn.Module, saved: SavedAdapter) -> SavedAdapter:
    """Returns an adapter by the names of a model of Transformers, if its names are another checkpoint's."""
    from graphpeft.stacks.adapter_files import AdapterFiles
    from graphpeft.stacks.transformers4 import as_in_model

    files = AdapterFiles(saved.config.to_dict(), saved.tensors)
    converted = as_in_model(files, model, modules_by_path(model))
    if converted is files:
        return saved
    return saved._replace(config=PeftConfig.from_dict(converted.config), tensors=dict(converted.tensors))


def renamed(values: Mapping[str, torch.Tensor], key_mapping: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns a file's tensors by other names, as PEFT's `key_mapping` says."""
    patterns = {Pattern(pattern, pattern, "key_mapping"): new for pattern, new in key_mapping.items()}

    def mapped(key: str) -> str:
        own = key.removeprefix(PREFIX)
        found = next((pattern for pattern in patterns if pattern.search(own)), None)
        return key if found is None or own == key else PREFIX + found.sub(patterns[found], own)

    return {mapped(key): tensor for key, tensor in values.items()}
