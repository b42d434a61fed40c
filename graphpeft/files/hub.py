"""Finds an adapter's files: in a folder, or in a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
HUB_OPTIONS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"})
"""Options that are passed on to ``huggingface_hub.hf_hub_download``."""

_FORMER_OPTIONS = frozenset({"proxies", "resume_download"})
"""Options that it had once, which other libraries still pass on as None or False."""


def adapter_file(path_or_repo: str | os.PathLike[str], filename: str, **hub_options: Any) -> str:
    """Returns the path of an adapter's file in a local folder, or downloads it from the Hub."""
    hub_options = {name: value for name, value in hub_options.items() if value or name not in _FORMER_OPTIONS}
    unknown = sorted(hub_options.keys() - HUB_OPTIONS)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: not an option here; options of the Hub are {', '.join(sorted(HUB_OPTIONS))}"
        )
    folder = Path(path_or_repo, hub_options.get("subfolder") or "")
    if folder.is_dir():
        file = folder / filename
        if file.is_file():
            return str(file)
        hint = "; give the folder that save_pretrained wrote"
        if filename == WEIGHTS_NAME and (folder / PICKLED_WEIGHTS_NAME).is_file():
            hint = f"; there is a {PICKLED_WEIGHTS_NAME}, which use_safetensors=None or False reads"
        elif inside := sorted(path.parent.name for path in folder.glob(f"*/{filename}")):
            hint = f"; folders inside it do: {', '.join(inside)}. Name one by its path, or with subfolder={inside[0]!r}"
        raise FileNotFoundError(f"{folder} holds no {filename}{hint}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(str(path_or_repo), filename, **hub_options)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{path_or_repo} is no folder, and the Hub gives no {filename} for it: {error}"
        ) from error


def weights_file(
    path_or_repo: str | os.PathLike[str], use_safetensors: bool | None, hub_options: Mapping[str, Any]
) -> str:
    """Returns the path of an adapter's file of tensors, as `adapter_file` does."""
    names = {True: [WEIGHTS_NAME], False: [PICKLED_WEIGHTS_NAME], None: [WEIGHTS_NAME, PICKLED_WEIGHTS_NAME]}
    missing: list[FileNotFoundError] = []
    for name in names[use_safetensors]:
        try:
            return adapter_file(path_or_repo, name, **hub_options)
        except FileNotFoundError as error:
            missing.append(error)
    raise missing[0]
