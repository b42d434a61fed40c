"""Exports a model to files that run without this library, and checks them in their own runtime."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.adapter_names import name_like
from graphpeft.adapters.state import adapters_of
from graphpeft.exporting import adapter_inputs, caches, carriers, copies
from graphpeft.exporting import check as checks
from graphpeft.exporting.adapter_inputs import AdapterInput, AdapterInputs
from graphpeft.exporting.atomic_export import staged_beside
from graphpeft.exporting.caches import generation_inputs
from graphpeft.exporting.carriers import CARRIERS, Prepared
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example
from graphpeft.exporting.export_report import ExportReport
from graphpeft.exporting.formats import FORMATS, formats_of
from graphpeft.exporting.formats.format import Export, Format
from graphpeft.exporting.program import Dynamic, Program
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.paths import unwrapped
from graphpeft.model.peft_model import PeftModel
from graphpeft.passes.optimization import optimize
from graphpeft.peft_errors import PeftWarning
from graphpeft.progress import steps

__all__ = [
    "CARRIERS",
    "FORMATS",
    "ExportError",
    "ExportReport",
    "export",
    "export_adapter",
    "formats_of",
    "generation_inputs",
]


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    format: str = "pt2",
    adapters: str = "merged",
    dynamic: Dynamic = True,
    check: bool = True,
) -> ExportReport:
    """Exports a model in evaluation mode to a file that runs without this library.

    The file is run in its own runtime and compared with the model, on the example and on other sizes. If a result
    differs or anything else fails, nothing is written, and files that were at `path` are unchanged. The model is
    unchanged in any case.

    Args:
        model: A model with or without adapters; also a graph that `trace` returned, or the result of
            ``torch.compile``.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
        path: The file to write. For weights, a path without a suffix is a folder.
        format: ``"pt2"``: a program of ``torch.export``. ``"aoti"``: a package of AOTInductor. ``"onnx"``: an ONNX
            graph. ``"openvino"``: OpenVINO's graph. ``"executorch"``: a program of ExecuTorch. ``"safetensors"`` and
            ``"state_dict"``: the weights alone.
        adapters: ``"merged"``: added to the weights. ``"baked"``: branches in the graph. ``"inputs"``: the tensors of
            one adapter are an argument, for any adapter of the same shapes. ``"rows"``: the tensors of several adapters
            are an argument, and each row of the batch chooses one. For the last two, each adapter of the model is also
            written into a file of its own beside `path`.
        dynamic: True: all input sizes that the model doesn't fix are dynamic; the report shows them. False: no size is
            dynamic. Otherwise, the argument ``dynamic_shapes`` of ``torch.export``.
        check: Whether to run the file and compare.

    Returns:
        The files, the inputs, and the greatest differences from the model; it prints as tables.

    Raises:
        ExportError: If the model can't be exported in this format and adapter mode, or the file's results differ.
        GuardError: If the model is a traced graph, and branches otherwise on these inputs than on its example inputs.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> report = export(model, (torch.randn(3, 4),), "model.pt2")
        >>> program = torch.export.load("model.pt2").module()
        >>> program(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    form = _known(FORMATS, format, "format")
    prepare = _known(CARRIERS, adapters, "adapters")
    target = Path(os.path.abspath(path))  # the folder "." has a name, too
    _refuse_path(form, format, target)
    model, given = unwrapped(model), Example.of(example_inputs)
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError(
            "the model is a ScriptModule, of which torch.export makes no graph; export the module that it was made from"
        )
    model, given = caches.taken_apart(model, given)
    with steps(3) as step, _generators_kept(model), staged_beside(target) as folder:
        step("copying the model")
        source, probe = copies.sharing_weights(model), copies.sharing_weights(model)
        _refuse_example(probe, given)
        made = Export(source, probe, prepare(model), given, dynamic)
        step(f"writing {target.name}")
        unfinished = folder / target.name
        try:
            adapter_files = _write(form, format, made, unfinished)
            step("checking it")
            found = checks.checked(form, made, unfinished, given) if check else []
        except ExportError as error:
            with tempfile.TemporaryDirectory() as scratch:
                raise _with_that_of_base(error, model, form, given, dynamic, Path(scratch) / target.name) from error
        if form.has_graph and dynamic is True:
            _warn_of_fixed_batch(made.program, len(given.tensors))
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        sizes = {target.parent / file.relative_to(folder): file.stat().st_size for file in files}
    inputs = _shapes(made.program, len(given.tensors)) if form.has_graph else {}
    placed = {name: target.parent / file.name for name, file in adapter_files.items()}
    return ExportReport(format, adapters, target, sizes, placed, inputs, tuple(found))


def export_adapter(
    model: nn.Module,
    adapter: str | os.PathLike[str],
    exported: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes an adapter into a file for a model that was exported with adapters as inputs.

    Args:
        model: The exported model, with or without adapters, or the result of ``torch.compile``; it isn't changed.
        adapter: The name of an adapter of the model, or a folder with PEFT's files.
        exported: The file that `export` wrote with ``adapters="inputs"`` or ``"rows"``.
        path: The file to write; None means a file beside `exported`, with the name that `export` uses.

    Returns:
        The path of the file: an `.onnx_adapter` for ``onnxruntime.LoraAdapter``, or safetensors with the inputs' names.

    Raises:
        ExportError: If `exported` takes no adapters, or this adapter doesn't fit its inputs; nothing is written then.
        CheckpointError: If the folder's files don't fit the model; nothing is written then.

    Examples:
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, "first")
        >>> report = export(model, (torch.randn(3, 4),), "model.pt2", adapters="inputs")
        >>> model.add_adapter("second", config)
        >>> export_adapter(model, "second", "model.pt2").name
        'model.second.safetensors'
    """
    file, model = Path(exported), unwrapped(model)
    format, adapter_mode, wanted = _read_about(file)
    with _generators_kept(model):
        copied, name = _with_adapter(model, adapter)
    values = adapter_inputs.fitted(adapter_inputs.inputs_of(copied, name), wanted, name, file.name)
    if adapter_mode == "rows":
        values = {key: value.unsqueeze(0) for key, value in values.items()}
    target = Path(path) if path is not None else _adapter_file(FORMATS[format], file, name)
    with staged_beside(target) as folder:
        FORMATS[format].write_adapter(values, folder / target.name)
    return target


def _generators_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Restores the states of PyTorch's random generators at the end."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return torch.random.fork_rng(devices=list(devices))


def _known(table: Mapping[str, Any], name: str, argument: str) -> Any:
    if name not in table:
        raise ExportError(f"{argument} is {name!r}; it can be {', '.join(map(repr, table))}")
    return table[name]


def _refuse_path(form: Format, name: str, path: Path) -> None:
    if path.suffix not in form.suffixes:
        wanted = " or ".join(suffix or "no suffix" for suffix in form.suffixes)
        others = " or ".join(f"format={other!r}" for other in formats_of(path.suffix))
        hint = f"; {path.suffix or 'no suffix'} is for {others}" if others else ""
        raise ExportError(f"{path.name} is to end with {wanted} for format={name!r}{hint}")
    if path.exists() and path.is_dir() == bool(path.suffix):
        there, wanted = ("a folder", "a file") if path.suffix else ("a file", "a folder")
        raise ExportError(f"{path} is {there}, and format={name!r} would write {wanted} there; choose another path")


def _refuse_example(source: Any, given: Example) -> None:
    try:
        given.call(source)
    except GuardError:
        raise
    except Exception as error:
        raise ExportError(f"the model can't be called with example_inputs: {type(error).__name__}: {error}") from error


def _shapes(program: Program, own: int) -> dict[str, str]:
    """Returns the shapes of the model's own inputs, which are the first, by name."""
    return {one.name: shape for one, shape in zip(program.inputs[:own], program.shapes(), strict=False)}


def _warn_of_fixed_batch(program: Program, own: int) -> None:
    if not any(0 in one.dynamic for one in program.inputs[:own]):
        shapes = ", ".join(f"{name} {shape}" for name, shape in _shapes(program, own).items())
        warnings.warn(
            f"the batch isn't dynamic, since the model fixes the first size of its inputs: {shapes}",
            PeftWarning,
            stacklevel=3,
        )


def _about(format: str, prepared: Prepared) -> str:
    """Returns the text to store in an exported file for `export_adapter`: format, adapter mode and inputs."""
    about: dict[str, Any] = {"format": format, "adapters": prepared.adapter_mode}
    if prepared.interface is not None:
        inputs, method, computations = prepared.interface
        values = {key: one.value for key, one in inputs.items()}
        shapes = {key: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in values.items()}
        about |= {"inputs": shapes, "method": method, "computations": computations}
    return json.dumps(about)


def _read_about(file: Path) -> tuple[str, str, AdapterInputs]:
    """Returns a file's format, adapter mode, and inputs for an adapter."""
    if not file.exists():
        raise ExportError(f"there is no {file}; export the model there with adapters='inputs' or 'rows' first")
    for name, form in FORMATS.items():
        about = json.loads(form.about(file) or "{}") if file.suffix in form.suffixes else {}
        if about.get("format") == name and "inputs" in about:
            inputs = {
                key: AdapterInput(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
                for key, (shape, dtype) in about["inputs"].items()
            }
            return name, about["adapters"], AdapterInputs(inputs, about["method"], about["computations"])
    raise ExportError(
        f"{file} takes no adapters: it wasn't written by export with adapters='inputs' or 'rows' as a graph"
    )


def _write(form: Format, name: str, export: Export, path: Path) -> dict[str, Path]:
    """Writes an export, and returns the files of its adapters."""
    prepared = export.prepared
    files = {one: _adapter_file(form, path, one) for one in prepared.adapters} if form.has_graph else {}
    try:
        form.write(export, path, _about(name, prepared))
        for one, file in files.items():
            form.write_adapter(prepared.adapters[one], file)
    except (ExportError, GuardError, TraceError):
        raise
    except Exception as error:
        raise ExportError(f"the model can't be written with format={name!r}: {in_short(error)}") from error
    return files


def _adapter_file(form: Format, exported: Path, name: str) -> Path:
    return exported.with_name(f"{exported.stem}.{name}{form.adapter_suffix}")


def _with_adapter(model: nn.Module, adapter: str | os.PathLike[str]) -> tuple[Any, str]:
    """Returns a copy of a model with an adapter, and the adapter's name there."""
    own = getattr(model, "peft_config", {})
    if isinstance(adapter, str) and adapter in own:
        return _without_passes(copies.sharing_weights(model)), adapter
    folder = Path(adapter)
    if not folder.is_dir():
        raise ExportError(
            f"{str(adapter)!r} is no adapter of the model, which has {', '.join(map(repr, own)) or 'none'}, and no "
            "folder with PEFT's files"
        )
    name = name_like(folder.absolute().name, own)
    copied = copies.with_own_weights(model)  # loading may overwrite weights of the model
    if own:
        copied.load_adapter(folder, name)
    else:
        PeftModel.from_pretrained(copied, folder, name)
    return _without_passes(copied), name


def _without_passes(copied: Any) -> Any:
    """Removes optimisation passes from an adapted copy, since they would change the digests of computations."""
    optimize(copied, [])
    return copied


def _with_that_of_base(
    error: ExportError, model: Any, form: Format, given: Example, dynamic: Dynamic, path: Path
) -> ExportError:
    """Returns the refusal of an export, which says so if the base without its adapters is refused, too."""
    if adapters_of(model) is None or not form.has_graph:
        return error
    base = copies.base_of(model)
    made = Export(base, copies.sharing_weights(base), carriers.merged(base), given, dynamic)
    try:
        form.write(made, path, "{}")
        checks.checked(form, made, path, given)
    except Exception as of_base:
        reason = str(of_base) if isinstance(of_base, ExportError) else in_short(of_base)
        why = "for the same reason" if reason == str(error) else f"since {reason}"
        return ExportError(f"{error}. The base without its adapters can't be exported so either, {why}")
    return error
