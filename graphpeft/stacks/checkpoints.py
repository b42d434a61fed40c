"""Checkpoints of Transformers' models whose matrices lie otherwise in the model: renamed, joined, stacked or turned.

Transformers converts checkpoints of earlier versions as it loads them: of ``experts.0.gate_proj``,
``experts.0.up_proj``, ``experts.1.gate_proj``, … it makes one parameter, ``experts.gate_up_proj``. Its own functions
tell where each entry of a parameter lies in a checkpoint: they convert parameters whose entries are their own places.
So nothing here knows a model, or an operation of a conversion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import join, modules_by_path


class Place(NamedTuple):
    """The place of a checkpoint's matrix in a parameter of the model.

    Attributes:
        parameter: The path of the parameter.
        shape: The shape of the parameter, (experts, …, …) where it is a stack.
        expert: The number of the matrix in a stack; 0 where the parameter is none.
        rows: The rows of the parameter's matrix in which the checkpoint's lies, in the order of its own.
        columns: The columns, likewise.
        is_turned: Whether the matrix is transposed there: its outputs are the columns.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int
    rows: Tensor
    columns: Tensor
    is_turned: bool


def is_converted(model: Any) -> bool:
    """Returns whether Transformers converts checkpoints of a model as it loads them."""
    loaded: Any = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(model, loaded.PreTrainedModel) and bool(_conversions(model))


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def present_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Returns the names that tensors of a checkpoint have in a model, as far as their names alone differ."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in _conversions(model) if isinstance(each, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def names_of_experts(model: Any) -> list[str]:
    """Returns the names of a checkpoint's matrices that are parts of stacks in a model."""
    if not is_converted(model):
        return []
    return [name for name, place in places(model, modules_by_path(model)).items() if len(place.shape) == 3]


def places(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Returns where each matrix of a checkpoint lies in the model, by its name there without ``.weight``."""
    from transformers.core_model_loading import revert_weight_conversion

    own = ((join(path, name), each) for path, inner in modules.items() for name, each in inner._parameters.items())
    shapes = {name: tuple(each.shape) for name, each in own if each is not None and each.dim() in (2, 3)}
    try:
        rows = revert_weight_conversion(
            model, {name: _rows(i, shape) for i, (name, shape) in enumerate(shapes.items())}
        )
        columns = revert_weight_conversion(model, {name: _columns(shape) for name, shape in shapes.items()})
    except Exception as error:  # of Transformers' code, which can't revert each of its conversions
        raise CheckpointError(
            f"the adapter has names of another checkpoint, and Transformers doesn't tell where its tensors are in this "
            f"{type(model).__name__}: {error}; load it where it was trained, and save the merged model"
        ) from error
    return dict(_found(list(shapes.items()), rows, columns))


_OF_PARAMETER = 2**32
"""The distance of the numbers of two parameters' rows."""


def _rows(number: int, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor whose entries are the numbers of their rows, counted through a stack, and of their parameter."""
    rows = torch.arange(shape[0] if len(shape) == 2 else shape[0] * shape[1]) + number * _OF_PARAMETER
    return rows.view(*shape[:-1], 1).expand(shape)


def _columns(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(shape[-1]).expand(shape)


def _found(
    shapes: Sequence[tuple[str, tuple[int, ...]]], at_rows: Mapping[str, Tensor], at_columns: Mapping[str, Tensor]
) -> Iterator[tuple[str, Place]]:
    for name, rows in at_rows.items():
        if rows.dim() != 2:
            continue  # a stack in the checkpoint, too
        columns = at_columns[name]
        is_turned = len(rows) > 1 and bool(rows[0, 0] == rows[1, 0])
        if is_turned:
            rows, columns = rows.T, columns.T
        parameter, shape = shapes[int(rows[0, 0]) // _OF_PARAMETER]
        of_stack = rows[:, 0] % _OF_PARAMETER
        place = Place(parameter, shape, int(of_stack[0]) // shape[-2], of_stack % shape[-2], columns[0], is_turned)
        yield name.removesuffix(".weight"), place
