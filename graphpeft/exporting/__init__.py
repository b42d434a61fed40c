"""Ships an adapted model: in a file that runs without this library, checked in its own runtime."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.adapter_names import name_like
from graphpeft.exporting import adapter_inputs, copies, whole_or_nothing
from graphpeft.exporting import check as checks
from graphpeft.exporting.adapter_inputs import Interface, Slot
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example
from graphpeft.exporting.export_report import ExportReport
from graphpeft.exporting.formats import FORMATS
from graphpeft.exporting.formats.format import Export, Format
from graphpeft.exporting.program import Dynamic, Input
from graphpeft.exporting.steps import shown
from graphpeft.exporting.ways import WAYS, Prepared
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.model import PeftModel
from graphpeft.passes.optimization import optimize

__all__ = ["FORMATS", "WAYS", "ExportError", "ExportReport", "export", "export_adapter"]


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    format: str = "pt2",
    adapters: str = "merged",
    dynamic: Dynamic = True,
    check: bool = True,
) -> ExportReport:
    """Exports a model, adapted or not, in evaluation mode.

    What is written is run in its own runtime and compared with the model, on the example and on other sizes. If it
    differs, or anything else fails, nothing is left, and what was at `path` is as it was. So is the model in any case.

    Args:
        model: The model, which may be a traced one, or what ``torch.compile`` made of it.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
        path: The file. Weights can go into a folder, too, which has no suffix.
        format: ``"pt2"`` for ``torch.export``, ``"aoti"`` for a package of AOTInductor, ``"onnx"``, or the weights as
            ``"safetensors"`` or as a ``"state_dict"``.
        adapters: ``"merged"`` into the weights; ``"baked"`` in as branches; as ``"inputs"``, where the tensors of any
            adapter of the same shapes are an argument; or by ``"rows"``, where each row of the batch can have another.
            For the last two, each adapter of the model is written into a file of its own beside `path`.
        dynamic: Whether the sizes of the inputs can change; True for all that the model leaves open, and the report
            says which these are. A ``dynamic_shapes`` of ``torch.export`` for exactly these.
        check: Whether to run and compare what was written.

    Raises:
        ExportError: If the model can't be exported so, or what was written differs from it.
        GuardError: If the model was traced with inputs for which it decides otherwise than for these.
    """
    form = _known(FORMATS, format, "format")
    prepare = _known(WAYS, adapters, "adapters")
    target = Path(os.path.abspath(path))  # the folder "." has a name, too
    _refuse_path(form, format, target)
    model, given = getattr(model, "_orig_mod", model), Example.of(example_inputs)
    with shown(3) as step, _generators_kept(model), whole_or_nothing.folder_for(target) as folder:
        step("copying the model")
        source, probe = copies.sharing_weights(model), copies.sharing_weights(model)
        _refuse_example(probe, given)
        made = Export(source, probe, prepare(model), given, dynamic)
        step(f"writing {target.name}")
        unfinished = folder / target.name
        adapter_files = _write(form, format, made, unfinished)
        step("checking it")
        if form.has_graph and dynamic is True:
            _warn_of_fixed_batch(made.program.inputs[: len(given.tensors)])
        found = checks.checked(form, made, unfinished, given) if check else []
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        sizes = {target.parent / file.relative_to(folder): file.stat().st_size for file in files}
    inputs = {one.name: str(one) for one in made.program.inputs[: len(given.tensors)]} if form.has_graph else {}
    placed = {name: target.parent / file.name for name, file in adapter_files.items()}
    return ExportReport(format, adapters, target, sizes, placed, inputs, tuple(found))


def export_adapter(
    model: nn.Module,
    adapter: str | os.PathLike[str],
    exported: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes an adapter for a model that was exported with adapters as inputs.

    Args:
        model: The model that was exported, with or without adapters; it stays as it is. It may be compiled, too.
        adapter: The name of one of its adapters, or a folder with PEFT's files.
        exported: The file that `export` has written.
        path: The file to write; None for one beside `exported`, as `export` names those.

    Returns:
        The file: an `.onnx_adapter` for ``onnxruntime.LoraAdapter``, or safetensors with the names of the inputs.

    Raises:
        ExportError: If `exported` takes no adapters, or this one doesn't fit its inputs; nothing was written.
        CheckpointError: If the folder's files don't fit the model.
    """
    file, model = Path(exported), getattr(model, "_orig_mod", model)
    format, way, wanted = _read_about(file)
    with _generators_kept(model):
        copied, name = _with_adapter(model, adapter)
    values = adapter_inputs.fitted(adapter_inputs.carried(copied, name), wanted, name, file.name)
    if way == "rows":
        values = {key: value.unsqueeze(0) for key, value in values.items()}
    target = Path(path) if path is not None else _adapter_file(FORMATS[format], file, name)
    with whole_or_nothing.folder_for(target) as folder:
        FORMATS[format].write_adapter(values, folder / target.name)
    return target


def _generators_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Lets the random numbers behind a context be those that would have come without it."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return torch.random.fork_rng(devices=list(devices))


def _known(table: Mapping[str, Any], name: str, argument: str) -> Any:
    if name not in table:
        raise ExportError(f"{argument} is {name!r}; it can be {', '.join(map(repr, table))}")
    return table[name]


def _refuse_path(form: Format, name: str, path: Path) -> None:
    if path.suffix not in form.suffixes:
        wanted = " or ".join(suffix or "no suffix" for suffix in form.suffixes)
        raise ExportError(f"{path.name} is to end with {wanted} for format={name!r}")
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


def _warn_of_fixed_batch(inputs: Sequence[Input]) -> None:
    if not any(0 in one.dynamic for one in inputs):
        shapes = ", ".join(f"{one.name} {one}" for one in inputs)
        warnings.warn(
            f"the batch isn't dynamic, since the model fixes the first size of its inputs: {shapes}", stacklevel=3
        )


def _about(format: str, prepared: Prepared) -> str:
    """Returns what an exported file says of itself, for `export_adapter`."""
    about: dict[str, Any] = {"format": format, "adapters": prepared.way}
    if prepared.interface is not None:
        slots, method, computations = prepared.interface
        inputs = {key: (slot.shape, str(slot.dtype).removeprefix("torch.")) for key, slot in slots.items()}
        about |= {"inputs": inputs, "method": method, "computations": computations}
    return json.dumps(about)


def _read_about(file: Path) -> tuple[str, str, Interface]:
    """Returns a file's format and way, and what an adapter has to be for it."""
    if not file.exists():
        raise ExportError(f"there is no {file}; export the model there with adapters='inputs' or 'rows' first")
    for name, form in FORMATS.items():
        about = json.loads(form.about(file) or "{}") if file.suffix in form.suffixes else {}
        if about.get("format") == name and "inputs" in about:
            slots = {key: Slot(tuple(shape), getattr(torch, dtype)) for key, (shape, dtype) in about["inputs"].items()}
            return name, about["adapters"], Interface(slots, about["method"], about["computations"])
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
        return _plain(copies.sharing_weights(model)), adapter
    folder = Path(adapter)
    if not folder.is_dir():
        raise ExportError(
            f"{str(adapter)!r} is no adapter of the model, which has {', '.join(map(repr, own)) or 'none'}, and no "
            "folder with PEFT's files"
        )
    name = name_like(folder.absolute().name, own)
    copied = copies.with_own_weights(model)  # a file may bring other values of the model's own
    if own:
        copied.load_adapter(folder, name)
    else:
        PeftModel.from_pretrained(copied, folder, name)
    return _plain(copied), name


def _plain(copied: Any) -> Any:
    """Returns an adapted copy without passes, which would show in what an adapter computes."""
    optimize(copied, [])
    return copied
