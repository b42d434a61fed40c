"""ExecuTorch's programs, for phones and small devices; here with XNNPACK's kernels, which run on CPUs.

The arguments are the model's and then those of an adapter, in the order of their names. Memory is planned in advance: a
size that isn't limited otherwise can be as large as in the example, and smaller.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graphpeft.exporting.carriers import Case
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example
from graphpeft.exporting.formats.format import Export, Runner
from graphpeft.exporting.formats.pt2 import write_safetensors
from graphpeft.exporting.formats.tensors_alone import of_tensors, output_names
from graphpeft.exporting.program import quiet
from graphpeft.wording import joined

_ABOUT = "graphpeft"
"""The method of a program that returns the text for `export_adapter`."""


class ExecuTorch:
    """A program of ExecuTorch."""

    suffixes = (".pte",)
    has_graph = True
    checks_inputs = False
    adapter_suffix = ".safetensors"

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Lowers the program, as far as possible to XNNPACK."""
        exir = _library("executorch.exir")
        xnnpack = _library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        program = export.program
        output_names(program, "ExecuTorch")
        program.limit_to_example()
        try:
            with quiet():
                lowered = exir.to_edge_transform_and_lower(
                    of_tensors(program.exported),
                    partitioner=[xnnpack.XnnpackPartitioner()],
                    constant_methods={_ABOUT: about},
                    # this check of operators fixes the first size of tensors in lists, as chunk returns
                    compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
                ).to_executorch()
        except Exception as error:
            raise ExportError(
                f"ExecuTorch can't lower the model: {in_short(error)}. XNNPACK lets few sizes change: dynamic=False "
                "keeps all sizes, and a torch.export.Dim for the batch alone keeps the others; format='pt2' needs no "
                "lowering"
            ) from error
        missing = _missing_operators(lowered)
        if missing:
            raise ExportError(
                f"ExecuTorch can't lower the model: its runtime has nothing for {joined(missing)}. Replace the "
                "operation in the model, or export with format='pt2', which holds any operator"
            )
        with staged.open("wb") as file:
            lowered.write_to_file(file)

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the program into ExecuTorch's runtime."""
        program = _program(path)

        def run(case: Case, example: Example) -> Any:
            given = [tensor.detach().cpu().contiguous() for tensor in case.full(example).tensors]
            found = program.load_method("forward").execute(given)
            # the next call overwrites them
            return [value.clone() for value in found if isinstance(value, Tensor)]

        return run

    def about(self, path: Path) -> str | None:
        """Asks the program."""
        program = _program(path)
        return program.load_method(_ABOUT).execute([])[0] if _ABOUT in program.method_names else None

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Writes safetensors."""
        write_safetensors(tensors, staged)


def _missing_operators(lowered: Any) -> list[str]:
    """Returns the operators of a lowered program for which the runtime has no kernel."""
    plans = lowered.executorch_program.execution_plan
    operators = [one for plan in plans for one in plan.operators]
    names = [f"{one.name}.{one.overload}".removesuffix(".") for one in operators]
    known = _runtime().operator_registry.operator_names
    return [name for name in dict.fromkeys(names) if name not in known]


def _program(path: Path) -> Any:
    return _runtime().load_program(path)


def _runtime() -> Any:
    return _library("executorch.runtime").Runtime.get()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError("format='executorch' needs executorch: pip install graphpeft[executorch]") from error
