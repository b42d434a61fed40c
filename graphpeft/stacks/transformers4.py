"""LoRA by the names of another checkpoint of the same Transformers model, such as one entry for each expert's matrix.

    W_e = [G_e; U_e]        ΔW_e = [B_g A_g; B_u A_u] = [B_g 0; 0 B_u] [A_g; A_u]

Transformers 4 had a module for each expert's matrix, and 5 has parameters of many: a parameter of several matrices gets
the sum of their ranks. The tensors are those of PEFT's ``utils/transformers_weight_conversion.py`` for the models that
it knows, and are made likewise for all others. Servers read an entry for each matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import modules_by_path
from graphpeft.stacks.adapter_files import (
    AdapterFiles,
    Lora,
    LowRank,
    read_lora,
    refuse_other_factors,
    refuse_other_meanings,
    written_lora,
)
from graphpeft.stacks.checkpoints import Place, is_converted, past_names, places, present_names
from graphpeft.stacks.peft_files import PREFIX
from graphpeft.targeting.pattern_values import pattern_value
from graphpeft.targeting.targets import TargetOptions, compile_matcher
from graphpeft.wording import joined

T = TypeVar("T")

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
    if all(path in modules for path in (*lora.layers, *lora.embeddings)) or not is_converted(model):
        return files
    layers: dict[str, LowRank] = {}
    parts: dict[str, list[Part]] = {}
    found = places(model, modules)
    weights = [f"{path}.weight" for path in (*lora.layers, *lora.embeddings, *lora.magnitudes)]
    names = present_names(model, weights)
    for path, change in lora.layers.items():
        renamed = names[f"{path}.weight"].removesuffix(".weight")
        if path in found and found[path].parameter.removesuffix(".weight") not in modules:
            parts.setdefault(found[path].parameter, []).append((found[path], change))
        elif renamed in modules:
            layers[renamed] = change
        else:
            return files  # of another model, or of one whose layers are replicated
    who = "a file's names are another checkpoint's"
    refuse_other_meanings(files.config, who)
    refuse_other_factors(lora, who)
    _refuse_lacking(files.config, lora, found)
    magnitudes = {names[f"{path}.weight"].removesuffix(".weight"): own for path, own in lora.magnitudes.items()}
    if parted := [path for path in magnitudes if path not in layers]:
        raise CheckpointError(
            f"{who}, and the adapter has magnitudes of DoRA at {joined(parted)}, which have no place in "
            "matrices that are joined or parted; merge it where it was trained, and take the merged model"
        )
    if twice := [*lora.parameters.keys() & parts.keys()]:
        raise CheckpointError(f"the file has {joined(twice)} as a whole and by its matrices; save the adapter again")
    parameters = {name: _joined(name, of_parameter) for name, of_parameter in parts.items()}
    others = present_names(model, [key.removeprefix(PREFIX) for key in lora.others])
    made = Lora(
        layers,
        lora.parameters | parameters,
        {names[f"{path}.weight"].removesuffix(".weight"): own for path, own in lora.embeddings.items()},
        magnitudes,
        {PREFIX + others[key.removeprefix(PREFIX)]: tensor for key, tensor in lora.others.items()},
    )
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
        if model is None:
            raise CheckpointError("names of the checkpoint are told by the base; name it by --base")
        raise CheckpointError(
            f"a {type(model).__name__} with an adapter of {files.config.get('peft_type')} has no other names in its "
            "checkpoint by Transformers' conversions; save it as it is"
        )
    modules = modules_by_path(model)
    lora = lora_in_checkpoint(files, model, "names of the checkpoint are wanted")
    names = {*places(model, modules), *_names(modules)} - read_lora(files, modules).parameters.keys()
    return written_lora(files.config, lora, modules, names)


def lora_in_checkpoint(files: AdapterFiles, model: Any, who: str) -> Lora:
    """Returns LoRA's changes by the names of the model's checkpoint, with one for each matrix that has a name there.

    Args:
        files: The files, by the names of the model.
        model: The model; None, and one that isn't Transformers', has no other names.
        who: Words for an error, which tell who needs these names.

    Raises:
        CheckpointError: If the adapter is of a kind that can't be converted.
    """
    refuse_other_meanings(files.config, who)
    modules = modules_by_path(model) if model is not None else {}
    lora = read_lora(files, modules)
    if not is_converted(model):
        return lora
    refuse_other_factors(lora, who)
    found = places(model, modules)
    by_parameter: dict[str, dict[str, Place]] = {}
    for name, place in found.items():
        by_parameter.setdefault(place.parameter, {})[name] = place

    def renamed(own: Mapping[str, T]) -> dict[str, T]:
        return {_name_of_layer(path, by_parameter): each for path, each in own.items()}

    layers, kept = renamed(lora.layers), dict[str, LowRank]()
    for name, change in lora.parameters.items():
        parts = by_parameter.get(name, {})
        layers |= _parted(parts, change)
        if not parts:
            kept[name] = change
    names = past_names(model, [key.removeprefix(PREFIX) for key in lora.others])
    others = {PREFIX + names[key.removeprefix(PREFIX)]: tensor for key, tensor in lora.others.items()}
    return Lora(layers, kept, renamed(lora.embeddings), renamed(lora.magnitudes), others)


def _name_of_layer(path: str, by_parameter: Mapping[str, Mapping[str, Place]]) -> str:
    """Returns the name of a layer in the checkpoint, where its weight is to lie as it does in the model."""
    found = by_parameter.get(f"{path}.weight", {})
    if len(found) != 1 or not _is_whole(next(iter(found.values()))):
        raise CheckpointError(
            f"{path} is another matrix, or a part of one, in the checkpoint: {joined([*found]) or 'of no name'}; save "
            "it as it is"
        )
    return next(iter(found))


def _is_whole(place: Place) -> bool:
    """Returns whether a checkpoint's matrix is a parameter of the model as it is."""
    sides = place.rows.tolist(), place.columns.tolist()
    return not place.is_turned and sides == tuple([*range(size)] for size in place.shape)


_CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""The options by which a config names layers."""


def _refuse_lacking(config: Mapping[str, Any], lora: Lora, found: Mapping[str, Place]) -> None:
    """Raises CheckpointError if a file lacks a matrix of the checkpoint that its own config names."""
    options: dict[str, Any] = {name: config.get(name) for name in _CHOOSING}
    is_named = compile_matcher(TargetOptions(**options))
    there = {*lora.layers, *lora.embeddings}
    lacking = [path for path in found if path not in there and is_named(path)]
    wanted = {path: pattern_value(config.get("rank_pattern") or {}, path, config["r"]) for path in lora.layers}
    if other := [path for path, change in lora.layers.items() if change.rank != wanted[path]]:
        raise CheckpointError(
            f"factors of {joined(other)} have other ranks than the config says; save the adapter again"
        )
    if lacking:
        raise CheckpointError(
            f"the adapter's file lacks {joined(lacking)}, which its config names; load it on the model that it was "
            "trained on"
        )


def _names(modules: Mapping[str, nn.Module]) -> list[str]:
    parameters = (f"{path}.{own}" for path, module in modules.items() for own in module._parameters if own != "weight")
    return [*modules, *parameters]


def _joined(name: str, parts: Sequence[Part]) -> LowRank:
    """Returns the change of a parameter from the changes of its parts."""
    place = parts[0][0]
    stack = place.shape[0] if len(place.shape) == 3 else 1
    columns, rows = place.shape[-2:] if place.is_turned else reversed(place.shape[-2:])
    for at, change in parts:
        outputs, inputs = _sides(at)
        if change.A.shape != (change.rank, len(inputs)) or change.B.shape != (len(outputs), change.rank):
            raise CheckpointError(
                f"factors of {name} have the shapes {tuple(change.A.shape)} and {tuple(change.B.shape)}, where the "
                f"model wants (r, {len(inputs)}) and ({len(outputs)}, r); load it on the model that it was trained on"
            )
    branches = _branches(parts, place_of=lambda part: part[0])
    ranks = [max(change.rank for _, change in branch) for branch in branches]
    scale = next((change.scale for _, change in parts if change.scale), 1.0)
    dtype = functools.reduce(torch.promote_types, (change.A.dtype for _, change in parts))
    A = torch.zeros(stack, sum(ranks), columns, dtype=dtype)
    B = torch.zeros(stack, rows, sum(ranks), dtype=dtype)
    start = 0
    for rank, branch in zip(ranks, branches, strict=True):
        for at, change in branch:
            own = torch.arange(start, start + change.rank)
            outputs, inputs = _sides(at)
            A[at.expert][own[:, None], inputs] = change.A.to(dtype)
            B[at.expert][outputs[:, None], own] = change.of(change.rank, scale).B.to(dtype)
        start += rank
    return LowRank(A, B, scale) if len(place.shape) == 3 else LowRank(A[0], B[0], scale)


def _sides(place: Place) -> tuple[Tensor, Tensor]:
    """Returns the places of a matrix's outputs and inputs in the parameter."""
    return (place.columns, place.rows) if place.is_turned else (place.rows, place.columns)


def _branches(parts: Sequence[T], place_of: Callable[[T], Place]) -> list[list[T]]:
    """Returns parts that lie at the same places of their experts' matrices together, in the order of the places."""
    found: dict[tuple[int, int], list[T]] = {}
    for part in parts:
        place = place_of(part)
        found.setdefault((int(place.rows[0]), int(place.columns[0])), []).append(part)
    return [found[first] for first in sorted(found)]


def _parted(parts: Mapping[str, Place], change: LowRank) -> dict[str, LowRank]:
    """Returns the changes of a parameter's parts, without the ranks that are another part's alone in all experts."""
    found: dict[str, LowRank] = {}
    own_factors = {name: _own_factors(place, change) for name, place in parts.items()}
    for branch in _branches(list(parts.items()), place_of=lambda part: part[1]):
        B = torch.stack([own_factors[name].B for name, _ in branch])
        is_idle = (B == 0).all(0).all(0)
        is_of_others = is_idle & (change.B != 0).flatten(0, -2).any(0)
        used = ~is_idle if bool(is_of_others.any()) and not bool(is_idle.all()) else torch.ones_like(is_idle)
        for name, _ in branch:
            own = own_factors[name]
            found[name] = LowRank(own.A[used].contiguous(), own.B[:, used].contiguous(), change.scale)
    return {name: found[name] for name in parts}


def _own_factors(place: Place, change: LowRank) -> LowRank:
    """Returns the factors of a parameter's part, of all ranks."""
    A, B = (each[place.expert] if each.dim() == 3 else each for each in (change.A, change.B))
    outputs, inputs = _sides(place)
    return LowRank(A[:, inputs], B[outputs], change.scale)
