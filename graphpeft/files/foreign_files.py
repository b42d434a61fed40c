"""Reads JSON and tensors from untrusted files.

All checks of their content are here. Callers get plain values of bounded depth, dense tensors by name, or an error that
names the file.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from graphpeft.files.atomic_files import read_together
from graphpeft.peft_errors import PeftError
from graphpeft.wording import shortened

_MOST_BYTES = 8 * 2**20
"""The greatest size of a JSON file."""

_MOST_PARTS = 100_000
"""The greatest number of entries in an option of a config; naming 30,000 layers three times needs fewer."""

_DEEPEST = 16
"""The greatest depth of nested lists and objects in JSON; configs have a depth of three."""


class CheckpointError(PeftError, ValueError):
    """A file of an adapter can't be read, or doesn't fit the model; the model is unchanged.

    Examples:
        >>> from pathlib import Path
        >>> Path("adapter_config.json").write_text("{")
        1
        >>> try:
        ...     PeftConfig.from_pretrained(".")
        ... except CheckpointError as error:
        ...     print(error)
        adapter_config.json isn't JSON: ...
    """


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        size = Path(path).stat().st_size
        text = Path(path).read_text(encoding="utf-8") if size <= _MOST_BYTES else None
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} isn't JSON: {error}. Copy it anew, or write it in UTF-8.") from error
    if text is None:
        raise CheckpointError(f"{path} has {size} bytes; a config has {_MOST_BYTES} at most")
    try:
        values = json.loads(text, object_pairs_hook=_with_distinct_keys)
    except RecursionError as error:
        raise CheckpointError(f"{path} nests too deep to be a config") from error
    except ValueError as error:
        raise CheckpointError(f"{path} isn't JSON: {shortened(str(error))}. Copy it anew.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not the keys of a config")
    for key, value in values.items():
        problem = _excess(value)
        if problem is not None:
            raise CheckpointError(f"{path}: {shortened(key)} {problem}")
    return values


def unreadable(path: str | os.PathLike[str] | None, error: OSError) -> CheckpointError:
    """Returns the error for a file that can't be opened or read."""
    return CheckpointError(f"{path} can't be read: {error.strerror or error}")


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return values


def _excess(value: Any) -> str | None:
    """Returns the limit that a JSON value exceeds, as a part of an error message, or None."""
    level, count = [value], 0
    for _ in range(_DEEPEST):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        count += sum(map(len, parts))
        if count > _MOST_PARTS:
            return f"has more than {_MOST_PARTS} entries, as no option does"
        level = [inner for part in parts for inner in part]
        if not level:
            return None
    return f"nests deeper than {_DEEPEST} levels, as no option does"


class Safetensors(NamedTuple):
    """The content of a safetensors file.

    Attributes:
        tensors: The tensors by name, on the CPU.
        metadata: Strings by name.
    """

    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, str]


def read_safetensors(path: str | os.PathLike[str]) -> Safetensors:
    """Reads a safetensors file, even if another process replaces it meanwhile."""
    try:
        found = read_together([path], lambda: _opened(path))
        return found._replace(tensors=_checked(found.tensors, path))
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        # dtypes that PyTorch lacks or supports partly raise other errors than SafetensorError
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file: {shortened(str(error))}. Copy it anew, or save the adapter "
            "again."
        ) from error


def _opened(path: str | os.PathLike[str]) -> Safetensors:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        return Safetensors(tensors, file.metadata() or {})


def read_pickle(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads tensors by name from a file of ``torch.save`` onto the CPU, without running code from the file."""
    try:
        with warnings.catch_warnings():
            # PyTorch warns about its own code for loading tensors
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise unreadable(path, error) from error
    # a damaged pickle calls functions with arbitrary arguments, which may raise any error
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged, or a pickle of more than tensors: {shortened(str(error))}. Copy it anew, or have PEFT "
            "save it as safetensors."
        ) from error
    return _checked(found, path)


def note_in_pickle(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Adds metadata to a file of ``torch.save``, which is an archive; readers that don't know of them see none."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/{_METADATA}", json.dumps(dict(metadata)))


def noted_in_pickle(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the metadata that `note_in_pickle` has added to a file, or {}."""
    if not zipfile.is_zipfile(path):
        return {}  # an older form of PyTorch's files
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{_METADATA}")]
            found = json.loads(archive.read(names[0])) if names else {}
    # a damaged archive may raise any error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {shortened(str(error))}. Copy it anew, or save it again.") from error
    is_text = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    if not is_text:
        raise CheckpointError(f"{path} is damaged: its {_METADATA} isn't what was written there; copy it anew")
    return found


_METADATA = "graphpeft.json"


def _checked(found: Any, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file detached, without lazy conjugation or negation."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an adapter's tensors by their names")
    for key, value in found.items():
        kind = _kind_of_other(value) if isinstance(key, str) else f"the name {shortened(repr(key))}, which is no text"
        if kind is not None:
            name = f"{shortened(key)} is" if isinstance(key, str) else "it has"
            raise CheckpointError(f"{path}: {name} {kind}; an adapter's file holds dense tensors by their names alone")
    return {key: value.detach().resolve_conj().resolve_neg() for key, value in found.items()}


def _kind_of_other(value: Any) -> str | None:
    """Describes a value that isn't a dense tensor; None for a dense tensor."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided:
        return f"a tensor in the layout {value.layout}"
    if value.is_quantized:
        return f"a quantised tensor of {value.dtype}"
    return "a tensor without data" if value.is_meta else None
