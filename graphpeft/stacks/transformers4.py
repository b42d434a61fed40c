"""LoRA by the names of another checkpoint of the same Transformers model, such as one entry for each expert's matrix.

    W_e = [G_e; U_e]        ΔW_e = [B_g A_g; B_u A_u] = [B_g 0; 0 B_u] [A_g; A_u]

Transformers 4 had a module for each expert's matrix, and 5 has parameters of many: a parameter of several matrices gets
the sum of their ranks. The tensors are those of PEFT's ``utils/transformers_weight_conversion.py`` for the models that
it knows, and are made likewise for all others. Servers read an entry for each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import modules_by_path
from graphpeft.stacks.adapter_files import AdapterFiles, Lora, LowRank, read_lora, written_lora
from graphpeft.stacks.checkpoints import Place, is_converted, places, present_names
from graphpeft.wording import joined

Part = tuple[Place, LowRank]
"""The change of one of a checkpoint's matrices, with the place of the matrix."""


def as_in_model(files: AdapterFiles, model: Any, modules: Mapping[str, nn.Module]) -> AdapterFiles:
    """Returns files by the names of a model, whatever checkpoint of it they name.

    Args:
        files: The files; those that fit are returned as they are.
        model: The model.
        modules: Its modules by path.

    Raises:
        CheckpointError: If the names are another checkpoint's, and the adapter is of a kind that can't be converted.
    """
    if files.config.get("peft_type") != "LORA":
        return files
    lora = read_lora(files, modules)
    if all(path in modules for path in lora.layers) or not is_converted(model):
        return files
    layers: dict[str, LowRank] = {}
    parts: dict[str, list[Part]] = {}
    found = places(model, modules)
    names = present_names(model, [f"{path}.weight" for path in lora.layers])
    for path, change in lora.layers.items():
        renamed = names[f"{path}.weight"].removesuffix(".weight")
        if path in found and found[path].parameter.removesuffix(".weight") not in modules:
            parts.setdefault(found[path].parameter, []).append((found[path], change))
        elif renamed in modules:
            layers[renamed] = change
        else:
            return files  # of another model, or of one whose layers are replicated
    _refuse_other_kinds(lora, "a file's names are another checkpoint's")
    parameters = {name: _joined(of_parameter) for name, of_parameter in parts.items()}
    made = lora._replace(layers=layers, parameters=lora.parameters | parameters)
    return written_lora(files.config, made, modules, _names(modules))


def as_in_checkpoint(files: AdapterFiles, model: Any) -> AdapterFiles:
    """Returns files by the names of the model's checkpoint, with an entry for each matrix that has one there.

    Args:
        files: The files, by the names of the model.
        model: The model.

    Raises:
        CheckpointError: If the adapter isn't LoRA of a Transformers model, or is of a kind that can't be converted.
    """
    if files.config.get("peft_type") != "LORA" or not is_converted(model):
        raise CheckpointError(
            f"a {type(model).__name__} with an adapter of {files.config.get('peft_type')} has no other names in its "
            "checkpoint by Transformers' conversions; save it as it is"
        )
    modules = modules_by_path(model)
    lora = read_lora(files, modules)
    _refuse_other_kinds(lora, "names of the checkpoint are wanted")
    found = places(model, modules)
    by_parameter: dict[str, dict[str, Place]] = {}
    for name, place in found.items():
        by_parameter.setdefault(place.parameter, {})[name] = place
    layers: dict[str, LowRank] = {}
    kept: dict[str, LowRank] = {}
    for path, change in lora.layers.items():
        only = list(by_parameter.get(f"{path}.weight", {path: None}))
        if len(only) > 1:
            raise CheckpointError(f"{path} is of several matrices in the checkpoint: {joined(only)}; save it as it is")
        layers[only[0]] = change
    for name, change in lora.parameters.items():
        parts = by_parameter.get(name, {})
        layers |= _parted(parts, change)
        if not parts:
            kept[name] = change
    names = {*found, *_names(modules)} - lora.parameters.keys()
    return written_lora(files.config, lora._replace(layers=layers, parameters=kept), modules, names)


def _names(modules: Mapping[str, nn.Module]) -> list[str]:
    parameters = (f"{path}.{own}" for path, module in modules.items() for own in module._parameters if own != "weight")
    return [*modules, *parameters]


def _refuse_other_kinds(lora: Lora, what: str) -> None:
    own = [
        *(f"magnitudes of DoRA at {path}" for path in lora.magnitudes),
        *(key for key in lora.others if ".lora_" in key),
    ]
    if own:
        raise CheckpointError(
            f"{what}, and the adapter has {joined(own)} beside LoRA's factors, which have no place in matrices that "
            "are joined or parted; merge it where it was trained, and take the merged model"
        )


def _joined(parts: Sequence[Part]) -> LowRank:
    """Returns the change of a parameter from the changes of its parts."""
    place = parts[0][0]
    stack = place.shape[0] if len(place.shape) == 3 else 1
    columns, rows = place.shape[-2:] if place.is_turned else reversed(place.shape[-2:])
    branches = _branches(parts)
    ranks = [max(change.rank for _, change in branch) for branch in branches]
    scale, dtype = parts[0][1].scale, parts[0][1].A.dtype
    A = torch.zeros(stack, sum(ranks), columns, dtype=dtype)
    B = torch.zeros(stack, rows, sum(ranks), dtype=dtype)
    start = 0
    for rank, branch in zip(ranks, branches, strict=True):
        for at, change in branch:
            own = torch.arange(start, start + change.rank)
            outputs, inputs = _sides(at)
            A[at.expert][own[:, None], inputs] = change.A
            B[at.expert][outputs[:, None], own] = (
                change.B if change.scale == scale else change.B * (change.scale / scale)
            )
        start += rank
    return LowRank(A, B, scale) if len(place.shape) == 3 else LowRank(A[0], B[0], scale)


def _sides(place: Place) -> tuple[Tensor, Tensor]:
    """Returns the places of a matrix's outputs and inputs in the parameter."""
    return (place.columns, place.rows) if place.is_turned else (place.rows, place.columns)


def _branches(parts: Sequence[Part]) -> list[list[Part]]:
    """Returns parts that lie at the same places of their experts' matrices together, in the order of the places."""
    found: dict[tuple[int, int], list[Part]] = {}
    for place, change in parts:
        found.setdefault((int(place.rows[0]), int(place.columns[0])), []).append((place, change))
    return [found[first] for first in sorted(found)]


def _parted(parts: Mapping[str, Place], change: LowRank) -> dict[str, LowRank]:
    """Returns the changes of a parameter's parts, without the ranks that are another part's alone."""
    found: dict[str, LowRank] = {}
    for name, place in parts.items():
        A, B = (each[place.expert] if each.dim() == 3 else each for each in (change.A, change.B))
        outputs, inputs = _sides(place)
        own = B[outputs]
        is_idle = (own == 0).all(0)
        used = ~is_idle if bool((is_idle & (B != 0).any(0)).any()) and not bool(is_idle.all()) else is_idle | True
        found[name] = LowRank(A[used][:, inputs].contiguous(), own[:, used].contiguous(), change.scale)
    return found
