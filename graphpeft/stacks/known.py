"""The stacks whose files are read and written, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.rules.config import PeftConfig
from graphpeft.stacks import gguf, mlx, peft_files, plain_lora, transformers4
from graphpeft.stacks.adapter_files import AdapterFiles
from graphpeft.wording import joined


class Stack(NamedTuple):
    """A library, or a version of one, with files of its own for adapters.

    Attributes:
        title: Its name for a person.
        convert: Returns PEFT's files for a model by the names and in the form of the library.
        write: Writes what `convert` has made into a staged folder.
        is_there: Returns whether a path leads to its files; None where these are PEFT's but for names.
        read: Reads a path as PEFT's files for a model; None likewise.
        has_own_base: Whether the base has a file of its own there, which `convert` and `read` get as `base`.
        has_tables: Whether its files may have tables of the base's embeddings, beside an adapter of these.
    """

    title: str
    convert: Callable[..., AdapterFiles]
    write: Callable[[AdapterFiles, Path], None]
    is_there: Callable[[Path], bool] | None = None
    read: Callable[..., AdapterFiles] | None = None
    has_tables: bool = False
    has_own_base: bool = False

    def beside(self, served_base: str | os.PathLike[str] | None) -> Stack:
        """Returns the stack with the file of the base that it serves."""
        if served_base is None:
            return self
        if self.read is None or not self.has_own_base:
            raise CheckpointError(f"{self.title} serves the checkpoint itself; leave out served_base")
        base = Path(served_base)
        return self._replace(convert=partial(self.convert, base=base), read=partial(self.read, base=base))


def _as_they_are(files: AdapterFiles, _: Any) -> AdapterFiles:
    return files


def _write_peft(files: AdapterFiles, staged: Path) -> None:
    peft_files.write(staged, PeftConfig.from_dict(files.config), files.tensors, safe_serialization=True)


STACKS: Mapping[str, Stack] = {
    "peft": Stack("PEFT", _as_they_are, _write_peft, has_tables=True),
    "transformers4": Stack("PEFT with Transformers 4", transformers4.as_in_checkpoint, _write_peft, has_tables=True),
    "plain": Stack("PEFT, with one rank and one scale for all layers", plain_lora.as_plain, _write_peft),
    "mlx": Stack("mlx-lm", mlx.converted, mlx.write, mlx.is_there, mlx.read),
    "gguf": Stack("llama.cpp", gguf.converted, gguf.write, gguf.is_there, gguf.read, has_own_base=True),
}


def stack_named(name: str, served_base: str | os.PathLike[str] | None = None) -> Stack:
    """Returns the stack of a name, with the file of the base that it serves."""
    if name not in STACKS:
        raise CheckpointError(f"{name!r} is no stack whose files are known; choose among {joined(list(STACKS))}")
    return STACKS[name].beside(served_base)


def recognised(path: Path) -> Stack | None:
    """Returns the stack whose files lie at a path, or None for PEFT's and unknown ones."""
    return next((each for each in STACKS.values() if each.is_there is not None and each.is_there(path)), None)
