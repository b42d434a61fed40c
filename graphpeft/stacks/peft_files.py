"""PEFT's files of an adapter, its config and its tensors: read at one time, and written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from graphpeft.files.atomic_files import read_together, waiting
from graphpeft.files.foreign_files import (
    CheckpointError,
    note_in_pickle,
    noted_in_pickle,
    read_pickle,
    read_safetensors,
    unreadable,
)
from graphpeft.files.hub import CONFIG_NAME, PICKLED_WEIGHTS_NAME, WEIGHTS_NAME, adapter_file, weights_file
from graphpeft.rules.config import PeftConfig

PREFIX = "base_model.model."
"""The begin of the names of tensors at modules."""

DIGEST = "graphpeft_config"
"""Under which a file of tensors has the digest of its config; PEFT ignores it, and its own files have none."""

OPERATIONS = "graphpeft_operations"
"""Under which it has the kinds of the operations that use weights of no layer, likewise."""


class SavedAdapter(NamedTuple):
    """The contents of an adapter's files.

    Attributes:
        config: The config.
        tensors: The tensors by their names in the file, on the CPU.
        is_of_one_save: Whether the tensors were saved with this config, as far as the file tells.
        operations: The kinds of the operations that used weights of no layer, by the weights' labels, likewise.
        of_version: The version of PEFT that the config names where parameters are targets; None if it names none.
    """

    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    is_of_one_save: bool = True
    operations: Mapping[str, str] = MappingProxyType({})
    of_version: str | None = None

    def refuse_two_saves(self, path_or_repo: str | os.PathLike[str]) -> None:
        """Raises CheckpointError if the tensors were saved with another config.

        It comes last, since a mistake in an edited config has an error of its own.
        """
        if not self.is_of_one_save:
            raise CheckpointError(
                f"{path_or_repo}: the tensors were saved with another {CONFIG_NAME}, with which they mean something "
                "else: the config was edited, or two programs have saved there at once. Save the adapter "
                "again; or give the config that you want, as "
                f"from_pretrained(…, config=PeftConfig.from_pretrained({str(path_or_repo)!r}))"
            )


def read(
    path_or_repo: str | os.PathLike[str], *, use_safetensors: bool | None = None, **hub_options: Any
) -> SavedAdapter:
    """Reads an adapter's config and its tensors, which lay there at one time.

    Two files can't take their places at once, so one of them may be the other's successor: then the writer, who may
    have been ended, has the config of the tensors in a folder of its own.
    """
    config = adapter_file(path_or_repo, CONFIG_NAME, **hub_options)
    PeftConfig.from_file(config)  # what is wrong in it is told before what is missing beside it
    weights = weights_file(path_or_repo, use_safetensors, hub_options)
    try:
        saved = read_together([config, weights], lambda: _read_both(config, weights))
    except OSError as error:
        raise unreadable(error.filename, error) from error
    tensors = with_those_beside(saved.config, saved.tensors, path_or_repo, use_safetensors, hub_options)
    return saved._replace(tensors=tensors)


def with_those_beside(
    config: PeftConfig,
    tensors: dict[str, torch.Tensor],
    path_or_repo: str | os.PathLike[str],
    use_safetensors: bool | None,
    hub_options: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, with those that PEFT writes into folders beside it."""

    def read_beside(name: str) -> Mapping[str, torch.Tensor]:
        subfolder = "/".join(filter(None, (hub_options.get("subfolder"), name)))
        return load(path_or_repo, use_safetensors=use_safetensors, **{**hub_options, "subfolder": subfolder})

    return dict(config.with_those_beside(tensors, read_beside))


def _read_both(config_file: str, weights: str) -> SavedAdapter:
    config = PeftConfig.from_file(config_file)
    tensors, metadata = _read(weights)
    digest, operations = metadata.get(DIGEST), _operations_in(metadata)
    if digest in (None, config.digest()):
        of_version = _version_in(config_file) if vars(config).get("target_parameters") else None
        return SavedAdapter(config, tensors, operations=operations, of_version=of_version)
    for file in waiting(Path(config_file).parent, CONFIG_NAME):
        with contextlib.suppress(OSError, ValueError):  # it has been put into place now, or isn't complete
            ready = PeftConfig.from_file(file)
            if digest == ready.digest():
                return SavedAdapter(ready, tensors, operations=operations, of_version=_version_in(str(file)))
    return SavedAdapter(config, tensors, is_of_one_save=False)


def _version_in(config_file: str) -> str | None:
    """Returns the version of PEFT that a config file names; a config has the present one where it names none."""
    named = PeftConfig.from_json_file(config_file).get("peft_version")
    return named if isinstance(named, str) else None


def _operations_in(metadata: Mapping[str, str]) -> Mapping[str, str]:
    try:
        found = json.loads(metadata.get(OPERATIONS, "{}"))
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}  # they only explain an error


def load(
    path_or_repo: str | os.PathLike[str], *, use_safetensors: bool | None = None, **hub_options: Any
) -> dict[str, torch.Tensor]:
    """Reads an adapter's tensors alone; arguments and errors as for `read`."""
    return _read(weights_file(path_or_repo, use_safetensors, hub_options))[0]


def _read(path: str) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Returns an adapter's tensors, and what else the file says of them."""
    if Path(path).name == PICKLED_WEIGHTS_NAME:
        return read_pickle(path), noted_in_pickle(path)
    saved = read_safetensors(path)
    return saved.tensors, saved.metadata


def write(
    staged: Path,
    config: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
    safe_serialization: bool,
    operations: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a config with the tensors that belong to it."""
    staged.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    (staged / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
    digest = PeftConfig.from_pretrained(staged).digest()  # of what a reader has, to whom a set may be a list
    metadata = {DIGEST: digest}
    if operations:
        metadata[OPERATIONS] = json.dumps(dict(operations))
    if safe_serialization:
        save_file(tensors, staged / WEIGHTS_NAME, metadata={"format": "pt", **metadata})
    else:
        torch.save(tensors, staged / PICKLED_WEIGHTS_NAME)
        note_in_pickle(staged / PICKLED_WEIGHTS_NAME, metadata)
