"""The protocol of formats, and what they are given to write."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from graphpeft.exporting.carriers import Case, Prepared
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.example import Example, can_call, wider
from graphpeft.exporting.program import Dynamic, Program, exported

Runner = Callable[[Case, Example], Any]
"""Runs one case on an example, from the exported files alone."""


class Export:
    """What a format writes: a prepared model, and its program.

    Args:
        source: The adapted model, a copy in evaluation mode.
        probe: Another copy, for calls that find out which inputs the model accepts: a call may change its buffers.
        prepared: The model, prepared for an adapter mode.
        example: The example inputs.
        dynamic: The sizes of the example that can change.
    """

    def __init__(self, source: Any, probe: Any, prepared: Prepared, example: Example, dynamic: Dynamic) -> None:
        self.source, self.probe, self.prepared, self.example, self.dynamic = source, probe, prepared, example, dynamic

    @functools.cached_property
    def program(self) -> Program:
        """The prepared model as PyTorch's program."""
        if self.dynamic is not False:
            *widened, _ = wider(self.probe, self.example)
            for one in widened:
                # a size of 1 can have a meaning, as in a mask for all heads, and then can't be another one
                with contextlib.suppress(ExportError):
                    program = exported(self.prepared, one, self.dynamic)
                    if can_call(program.exported.module(), self.prepared.cases[0].full(self.example)):
                        return program
        return exported(self.prepared, self.example, self.dynamic)

    @functools.cached_property
    def runnable(self) -> Callable[..., Any]:
        """The program as a function, which checks its inputs."""
        return self.program.exported.module()


class Format(Protocol):
    """A format of exported files."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes that a file of the format can have; ``""`` stands for a folder."""
        ...

    @property
    def has_graph(self) -> bool:
        """Whether a file holds a computation, not only weights."""
        ...

    @property
    def checks_inputs(self) -> bool:
        """Whether a file refuses inputs for which the model would branch otherwise than when it was exported."""
        ...

    @property
    def adapter_suffix(self) -> str:
        """The suffix of adapters' own files, where adapters are inputs."""
        ...

    def write(self, export: Export, path: Path, about: str) -> None:
        """Writes an export.

        Args:
            export: The export.
            path: The file or folder to write, in an empty folder; further files can be written beside it.
            about: A text that the file keeps, and that the method `about` returns.

        Raises:
            ExportError: If the format can't hold the model, or a needed library isn't installed.
        """
        ...

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the files and returns the function that runs them."""
        ...

    def about(self, path: Path) -> str | None:
        """Returns the text that `write` has kept in a file, or None."""
        ...

    def write_adapter(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Writes the tensors of an adapter, by their names as inputs, into a file of its own."""
        ...
