"""ONNX graphs, for onnxruntime and other runtimes.

The model's inputs have the names of its arguments; an adapter's inputs have the names in PEFT's files. An adapter's
inputs are also initialisers, with the values of the active adapter. So a caller can omit them, or let onnxruntime read
other values from an `.onnx_adapter`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.exporting.atomic_export import named_by_content
from graphpeft.exporting.carriers import Case
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example
from graphpeft.exporting.formats.format import Export, Runner
from graphpeft.exporting.formats.tensors_alone import output_names
from graphpeft.exporting.program import Input, path_of
from graphpeft.graph.calls import calls_of
from graphpeft.graph.paths import join
from graphpeft.graph.template import template_of
from graphpeft.graph.traced_model import stands_for
from graphpeft.wording import joined

_ABOUT = "graphpeft"

_FATAL_ALONE = 4
"""onnxruntime's logging level for fatal errors only; other errors raise exceptions anyway."""


class Onnx:
    """A graph of ONNX operators."""

    suffixes = (".onnx",)
    has_graph = True
    checks_inputs = False
    adapter_suffix = ".onnx_adapter"

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Translates the program and names its inputs and outputs."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _library(package)
        program = export.program
        names = output_names(program, "ONNX")
        translated = _translated(export)
        graph = translated.model.graph
        _rename(graph, list(graph.inputs), [one.name for one in program.inputs])
        _rename(graph, list(graph.outputs), names)
        for value, one in zip(graph.inputs, program.inputs, strict=True):
            _fix_sizes(value, one)
        for value in [value for value in graph.inputs if value.name in export.prepared.defaults]:
            _make_optional(graph, value, export.prepared.defaults[value.name])
        translated.model.metadata_props[_ABOUT] = about
        translated.save(staged)
        _name_data_by_content(staged)

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the graph into onnxruntime."""
        session = _session(path)
        names = [one.name for one in export.program.inputs]
        defaults = export.prepared.defaults

        def run(case: Case, example: Example) -> Any:
            tensors = dict(zip(names, case.full(example).tensors, strict=True))
            given = {name: _with_dimensions(one) if name in defaults else one for name, one in tensors.items()}
            arrays = {name: one.detach().cpu().numpy() for name, one in given.items()}
            return [torch.from_numpy(array) for array in session.run(None, arrays)]

        return run

    def about(self, path: Path) -> str | None:
        """Reads the graph without its weights."""
        model = _library("onnx").load(path, load_external_data=False)
        return next((prop.value for prop in model.metadata_props if prop.key == _ABOUT), None)

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Writes a file for ``onnxruntime.LoraAdapter``."""
        runtime = _library("onnxruntime")
        adapter = runtime.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        arrays = {name: _with_dimensions(tensor).cpu().contiguous().numpy() for name, tensor in tensors.items()}
        adapter.set_parameters({n: runtime.OrtValue.ortvalue_from_numpy(array) for n, array in arrays.items()})
        adapter.export_adapter(str(staged))


def _name_data_by_content(path: Path) -> None:
    """Renames the weights file of a large graph by a digest of its content, so that no other graph reads it."""
    data = path.with_name(f"{path.name}.data")
    if not data.exists():
        return
    onnx = _library("onnx")
    model = onnx.load(path, load_external_data=False)
    name = named_by_content(data, path).name
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(model, path)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"format='onnx' needs {name}: pip install graphpeft[export]") from error


def _session(path: Path) -> Any:
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL_ALONE
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        refused = f"onnxruntime can't load what was exported: {in_short(error).replace(str(path), path.name)}"
        if "NOT_IMPLEMENTED" in str(error) or "float16" in str(error):
            hint = "Its CPU provider lacks some operators in half precision; export model.float()"
        else:
            hint = "torch.onnx has translated an operation of the model to what ONNX refuses; format='pt2' needs none"
        raise ExportError(f"{refused}. {hint}") from error


def _with_dimensions(tensor: Tensor) -> Tensor:
    # onnxruntime's adapter files can't hold tensors without dimensions
    return tensor.detach().reshape(tensor.shape or (1,))


def _rename(graph: Any, values: list[Any], names: list[str]) -> None:
    """Renames values of a graph; other values with these names get new names."""
    inside = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in inside:
        if value.name in names and value not in values:
            value.name = f"{value.name}.inside"
    for value, name in zip(values, names, strict=True):
        value.name = name


def _fix_sizes(value: Any, given: Input) -> None:
    """Gives an input the sizes that the program fixes: PyTorch writes some of them as symbols, which fit any size."""
    ir = importlib.import_module("onnx_ir")
    sizes = zip(value.shape, given.shape, strict=True)
    value.shape = ir.Shape([size if isinstance(size, int) else symbol for symbol, size in sizes])


def _make_optional(graph: Any, value: Any, default: Tensor) -> None:
    """Adds a default value to an input; an input of shape () gets the shape (1,)."""
    ir = importlib.import_module("onnx_ir")
    if default.ndim:
        # quantisers take an operation's own initialiser for a constant: they would fix the adapter, and drop the input
        _read_behind(graph, value, "Identity", default.shape)
    else:
        if any(user.op_type not in _ELEMENTWISE for user, _ in value.uses()):
            _read_behind(graph, value, "Squeeze", ())
        value.shape = ir.Shape([1])
    value.const_value = ir.tensor(_with_dimensions(default).contiguous(), name=value.name)
    graph.register_initializer(value)


_ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
"""Operators for which a tensor of shape (1,) acts as a number, if the other operand has dimensions."""


def _read_behind(graph: Any, value: Any, operator: str, shape: Sequence[int]) -> None:
    """Lets the graph read an input only behind an operator, whose result has the shape."""
    ir = importlib.import_module("onnx_ir")
    node = ir.node(operator, [value])
    [result] = node.outputs
    result.name, result.type, result.shape = f"{value.name}.read", value.type, ir.Shape(shape)
    for user, index in value.uses():
        if user is not node:
            user.replace_input_with(index, result)
    graph.insert_before(graph[0], node)


def _translated(export: Export) -> Any:
    try:
        with _quiet():
            return torch.onnx.export(export.program.exported, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(_refusal(error, export)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's prints, log messages and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refusal(error: BaseException, export: Export) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    found = re.search(r"target=torch\.ops\.([\w.]+)|OpOverload\(op='([\w.]+)'", "\n".join(map(str, causes)))
    if found is None:
        return f"the model can't be translated to ONNX: {in_short(causes[-1])}. format='pt2' holds any operator"
    operator = found[1] or found[2]
    modules = joined(_modules_with(operator, export))
    if "No ONNX function found" not in str(causes[-1]):
        return (
            f"PyTorch can't translate {operator} to ONNX as {modules} calls it: {in_short(causes[-1])}. Replace it in "
            "the model, or export with format='pt2', which holds any operator"
        )
    return (
        f"ONNX has no operator for {operator}, which {modules} calls. Replace it in the model by others, register a "
        "translation with torch.onnx, or export with format='pt2', which holds any operator"
    )


def _modules_with(operator: str, export: Export) -> list[str]:
    """Returns the modules that call an operator, or an operator that decomposes into it."""
    own = operator.rpartition(".")[2]
    nodes = [node for node in export.program.exported.graph.nodes if node.op == "call_function"]
    exact = [node for node in nodes if str(node.target).startswith(operator)]
    alike = [node for node in nodes if own in str(node.target)]
    modules = dict(export.prepared.model.named_modules())
    paths = dict.fromkeys(path for node in exact or alike if (path := path_of(node)) in modules)
    # PyTorch's exporter attributes the nodes of a graph module to the module around it
    paths |= dict.fromkeys(_paths_in_graphs(own, modules))
    inside = [path for path in paths if path] or [""]
    return [f"{path or 'the model'} ({stands_for(modules[path]).__name__})" for path in inside]


def _paths_in_graphs(operator: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for path, module in modules.items():
        template = template_of(module)
        for node in template.graphs[0].nodes if template is not None else ():
            if node.op.startswith("call_") and node.op != "call_module" and operator in str(node.target):
                calls = calls_of(node)
                yield join(path, calls[-1].path) if calls else path
