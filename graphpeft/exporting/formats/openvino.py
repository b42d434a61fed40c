"""OpenVINO's intermediate representation: a graph as XML, and its weights in a file beside it.

The inputs have the names of the model's arguments; those of an adapter have the names in PEFT's files.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from graphpeft.exporting.carriers import Case
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example
from graphpeft.exporting.formats.format import Export, Runner
from graphpeft.exporting.formats.pt2 import write_safetensors
from graphpeft.exporting.formats.tensors_alone import of_tensors, output_names
from graphpeft.exporting.program import Input

_ABOUT = "graphpeft"


class OpenVino:
    """A graph of OpenVINO's operators."""

    suffixes = (".xml",)
    has_graph = True
    checks_inputs = False
    adapter_suffix = ".safetensors"

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Translates the program and names its inputs and outputs."""
        openvino = _library()
        program = export.program
        names = output_names(program, "OpenVINO")
        try:
            model = openvino.convert_model(of_tensors(program.exported))
        except Exception as error:  # OpenVINO's errors have no common class
            missing = str(error).partition("No conversion rule found for operations:")[2].split("\n")[0].strip()
            lacks = f"it has nothing for {missing}" if missing else in_short(error)
            raise ExportError(
                f"OpenVINO can't translate the model: {lacks}. dynamic=False spares what changing sizes need, and "
                "OpenVINO reads what format='onnx' writes with merged adapters, too"
            ) from error
        for one, port in zip(program.inputs, model.inputs, strict=True):
            port.get_tensor().set_names({one.name})
        _fix_sizes(model, program.inputs)
        for name, port in zip(names, model.outputs, strict=True):
            port.get_tensor().set_names({name})
        model.set_rt_info(about, [_ABOUT])
        openvino.save_model(model, staged, compress_to_fp16=False)

    def runner(self, export: Export, path: Path) -> Runner:
        """Compiles the graph for the CPU, to compute in the precision of its weights."""
        openvino = _library()
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        count = len(compiled.outputs)

        def run(case: Case, example: Example) -> Any:
            found = compiled([tensor.detach().cpu().numpy() for tensor in case.full(example).tensors])
            return [torch.from_numpy(found[place].copy()) for place in range(count)]

        return run

    def about(self, path: Path) -> str | None:
        """Reads the graph's XML alone."""
        try:
            found = ElementTree.parse(path).find(f"rt_info/{_ABOUT}")
        except ElementTree.ParseError:
            return None
        return None if found is None else found.get("value")

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Writes safetensors."""
        write_safetensors(tensors, staged)


def _fix_sizes(model: Any, inputs: Sequence[Input]) -> None:
    """Gives inputs the sizes that the program fixes, since OpenVINO's convolutions need those of their kernels."""
    shapes = {one.name: [size if isinstance(size, int) else -1 for size in one.shape] for one in inputs}
    model.reshape({port: shapes[port.get_any_name()] for port in model.inputs})


def _library() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise ExportError("format='openvino' needs openvino: pip install graphpeft[openvino]") from error
