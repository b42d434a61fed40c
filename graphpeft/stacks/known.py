"""The stacks whose files are read and written, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import modules_by_path
from graphpeft.rules.config import PeftConfig
from graphpeft.stacks import mlx, peft_files, plain_lora, transformers4
from graphpeft.stacks.adapter_files import AdapterFiles
from graphpeft.wording import joined


class Stack(NamedTuple):
    """A library, or a version of one, with files of its own for adapters.

    Attributes:
        title: Its name for a person.
        write: Writes PEFT's files for a model into a folder as its own.
        is_there: Returns whether a path leads to its files; None where these are PEFT's but for names.
        read: Reads a path as PEFT's files for a model; None likewise.
        has_tables: Whether its files may have tables of the base's embeddings, beside an adapter of these.
    """

    title: str
    write: Callable[[AdapterFiles, Any, Path], None]
    is_there: Callable[[Path], bool] | None = None
    read: Callable[[Path, Any], AdapterFiles] | None = None
    has_tables: bool = False


def _write_peft(files: AdapterFiles, model: Any, folder: Path) -> None:  # noqa: ARG001 - as of all stacks
    peft_files.write(folder, PeftConfig.from_dict(files.config), files.tensors, safe_serialization=True)


def _write_transformers4(files: AdapterFiles, model: Any, folder: Path) -> None:
    _write_peft(transformers4.as_in_checkpoint(files, model, modules_by_path(model)), model, folder)


def _write_plain(files: AdapterFiles, model: Any, folder: Path) -> None:
    _write_peft(plain_lora.as_plain(files, model), model, folder)


STACKS: Mapping[str, Stack] = {
    "peft": Stack("PEFT", _write_peft, has_tables=True),
    "transformers4": Stack("PEFT with Transformers 4", _write_transformers4, has_tables=True),
    "plain": Stack("PEFT, with one rank and one scale for all layers", _write_plain),
    "mlx": Stack("mlx-lm", mlx.write, mlx.is_there, mlx.read),
}


def stack_named(name: str) -> Stack:
    """Returns the stack of a name."""
    if name not in STACKS:
        raise CheckpointError(f"{name!r} is no stack whose files are known; choose among {joined(list(STACKS))}")
    return STACKS[name]


def recognised(path: Path) -> Stack | None:
    """Returns the stack whose files lie at a path, or None for PEFT's and unknown ones."""
    return next((each for each in STACKS.values() if each.is_there is not None and each.is_there(path)), None)
