"""The protocol of formats, and the export that they write."""

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
"""Runs one case on an example, using only the exported files."""


class Export:
    """A prepared model and its program, for a format to write.

    Args:
        source: The adapted model, a copy in evaluation mode.
        probe: Another copy, for calls that test which inputs the model accepts, since a call may change buffers.
        prepared: The model, prepared for an adapter mode.
        example: The example inputs.
        dynamic: The dynamic sizes of the example.
    """

    def __init__(self, source: Any, probe: Any, prepared: Prepared, example: Example, dynamic: Dynamic) -> None:
        self.source, self.probe, self.prepared, self.example, self.dynamic = source, probe, prepared, example, dynamic

    @functools.cached_property
    def program(self) -> Program:
        """The prepared model as PyTorch's program."""
        if self.dynamic is not False:
            *widened, _ = wider(self.probe, self.example)
            for one in widened:
                # a size of 1 may be required, as in a mask that broadcasts over heads
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
        """The allowed suffixes of a path; ``""`` means a folder."""
        ...

    @property
    def has_graph(self) -> bool:
        """Whether a file holds a computation, and not only weights."""
        ...

    @property
    def checks_inputs(self) -> bool:
        """Whether a file refuses inputs for which the model would branch otherwise than on the example."""
        ...

    @property
    def adapter_suffix(self) -> str:
        """The suffix of an adapter's own file, if adapters are inputs."""
        ...

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Writes an export.

        Args:
            export: The export.
            staged: The file or folder to write, in an empty staging folder; `write` may add files beside it.
            about: A text to store in the file; the method `about` returns it.

        Raises:
            ExportError: If the format can't hold the model, or a needed library isn't installed.
        """
        ...

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the files and returns the function that runs them."""
        ...

    def about(self, path: Path) -> str | None:
        """Returns the text that `write` has stored in a file, or None."""
        ...

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Writes the tensors of an adapter, by input name, into a file."""
        ...
