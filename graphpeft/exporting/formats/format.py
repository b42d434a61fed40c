"""What a format is: it writes what was prepared for an export, and runs what it has written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.example import Example, can_call, wider
from graphpeft.exporting.program import Dynamic, Program, exported
from graphpeft.exporting.ways import Case, Prepared

Runner = Callable[[Case, Example], Any]
"""Computes one case of an export on an example, from the files."""


class Export:
    """What is written.

    Args:
        source: The adapted model, a copy in evaluation mode.
        probe: Another copy, to find out what it can be called with: a call may change what the next one gives.
        prepared: The plain module that is made of it.
        example: What it is called with.
        dynamic: Which of the example's sizes can change.
    """

    def __init__(self, source: Any, probe: Any, prepared: Prepared, example: Example, dynamic: Dynamic) -> None:
        self.source, self.probe, self.prepared, self.example, self.dynamic = source, probe, prepared, example, dynamic

    @functools.cached_property
    def program(self) -> Program:
        """The module as PyTorch's program."""
        if self.dynamic is not False:
            *widened, _ = wider(self.probe, self.example)
            for one in widened:
                # a size of 1 that means something, such as that of a mask for all heads, can't be any other
                with contextlib.suppress(ExportError):
                    program = exported(self.prepared, one, self.dynamic)
                    if can_call(program.exported.module(), self.prepared.cases[0].full(self.example)):
                        return program
        return exported(self.prepared, self.example, self.dynamic)

    @functools.cached_property
    def runnable(self) -> Callable[..., Any]:
        """The program, which checks its inputs when it is called."""
        return self.program.exported.module()


class Format(Protocol):
    """A format of files."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the name of its file may end with."""
        ...

    @property
    def has_graph(self) -> bool:
        """Whether it holds a computation, and not only weights."""
        ...

    @property
    def checks_inputs(self) -> bool:
        """Whether a file refuses inputs for which the model decides otherwise than it did when it was exported."""
        ...

    @property
    def adapter_suffix(self) -> str:
        """What the names of adapters' files end with, for an export that takes adapters as inputs."""
        ...

    def write(self, export: Export, path: Path, about: str) -> None:
        """Writes an export.

        Args:
            export: The export.
            path: The file, or the folder, in a folder of its own, where other files may go beside it.
            about: A text to keep in the file, which `about` returns.

        Raises:
            ExportError: If the format can't hold it, or what writes it isn't installed.
        """
        ...

    def runner(self, export: Export, path: Path) -> Runner:
        """Returns what computes with the files alone."""
        ...

    def about(self, path: Path) -> str | None:
        """Returns the text that was kept in a file; None if there is none."""
        ...

    def write_adapter(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Writes the tensors of an adapter, by their names as inputs, for whoever runs the export."""
        ...
