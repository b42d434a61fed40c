"""Checkpoints of Transformers' models whose matrices lie otherwise in the model: renamed, joined, stacked or turned.

Transformers converts checkpoints of earlier versions as it loads them: of ``experts.0.gate_proj``,
``experts.0.up_proj``, ``experts.1.gate_proj``, … it makes one parameter, ``experts.gate_up_proj``. Its own functions
tell where each entry of a parameter lies in a checkpoint: they convert parameters whose entries are their own places.
So nothing here knows a model, or an operation of a conversion.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.own_tensors import own_tensor
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.wording import joined


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
    if not is_converted(model):
        return {name: name for name in names}
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in _conversions(model) if isinstance(each, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def past_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Returns the names that a model's tensors have in a checkpoint, as far as their names alone differ.

    Raises:
        CheckpointError: If a tensor has no name of its own there.
    """
    if not is_converted(model):
        return {name: name for name in names}
    from transformers.core_model_loading import revert_weight_conversion

    numbered = {name: torch.tensor([number]) for number, name in enumerate(names)}
    found: dict[str, str] = {}
    for past, number in revert_weight_conversion(model, numbered).items():
        if number.numel() == 1:
            found[names[int(number)]] = past
    if lacking := [name for name in names if name not in found]:
        raise CheckpointError(f"{joined(lacking)} are parts of other tensors in the checkpoint; save them as they are")
    return found


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


class Matrices:
    """The matrices of a model by the names of its checkpoint.

    Attributes:
        names: Their names, without ``.weight``.
    """

    def __init__(self, model: Any) -> None:
        self._modules = modules_by_path(model)
        self._places = places(model, self._modules) if is_converted(model) else {}
        weights = {path: inner._parameters.get("weight") for path, inner in self._modules.items()}
        own = [path for path, weight in weights.items() if weight is not None and weight.dim() == 2]
        self.names = [*self._places] or own

    def of(self, name: str) -> list[Tensor]:
        """Returns a matrix, (out, in), and the transpose where the layer's class doesn't tell which of both this is."""
        place = self._places.get(name)
        path, _, own = (f"{name}.weight" if place is None else place.parameter).rpartition(".")
        layer = self._modules[path]
        matrix = own_tensor(layer, own)
        if place is not None:
            stack = matrix[place.expert] if len(place.shape) == 3 else matrix
            part = stack[place.rows.to(stack.device)][:, place.columns.to(stack.device)]
            matrix = part.T if place.is_turned else part
        is_told = own != "weight" or isinstance(layer, nn.Linear | nn.Embedding)
        return [matrix] if is_told else [matrix, matrix.T]


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


class Conversion:
    """Transformers' conversions between the tensors in a checkpoint's files and a model's; none for other models.

    Attributes:
        parts: The names in the files of those tensors that are made into a tensor of the model, by its name there;
            more than one tensor of the model may be made of them.
        made: The tensors of the model that are made of those in files, by name.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._model: Any = model
        loaded: Any = sys.modules.get("transformers.modeling_utils")
        is_of_transformers = loaded is not None and isinstance(model, loaded.PreTrainedModel)
        conversions = _conversions(model) if is_of_transformers else []
        self._own = model.state_dict()
        self._renamings = [each for each in conversions if not hasattr(each, "operations")]
        self._converters = [each for each in conversions if hasattr(each, "operations")]
        self._prefix = getattr(model, "base_model_prefix", None) if is_of_transformers else None
        together: dict[str, list[str]] = {}
        for name in tensors:
            together.setdefault(self._named(name)[0] if is_of_transformers else name, []).append(name)
        if is_of_transformers:
            # as from_pretrained leaves them for the way back: those that this checkpoint needs
            self._model._weight_conversions = [each for each in conversions if each.was_used()] or None
        self.parts: dict[str, list[str]] = {}
        self.made: dict[str, Tensor] = {}
        for names in together.values():
            made = self.in_model({name: tensors[name] for name in names})
            self.parts |= dict.fromkeys(made.keys() & self._own.keys(), names)
            self.made |= made

    def in_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the model's tensors that are made of those in files, which are all parts of these."""
        made: dict[str, Any] = {}
        of_converters: dict[str, Any] = {}
        for name, tensor in tensors.items():
            renamed, pattern = self._named(name)
            if pattern is None:
                made[renamed] = tensor
                continue
            converter = next(each for each in self._converters if pattern in each.source_patterns)
            of_converters.setdefault(renamed, copy.deepcopy(converter)).add_tensor(renamed, name, pattern, tensor)
        for renamed, converter in of_converters.items():
            made |= converter.convert(renamed, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors in files of which some of the model's are made, which are all that are made of them."""
        only = {name: names for name, names in self.parts.items() if name in tensors}
        if all(len(names) == 1 and self._named(names[0])[1] is None for names in only.values()):
            return {names[0]: tensors[name] for name, names in only.items()}
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, dict(tensors)))

    def _named(self, name: str) -> tuple[str, str | None]:
        """Returns the name of a tensor in the model, and the pattern of the conversion that makes it."""
        if self._prefix is None:
            return name, None
        from transformers.core_model_loading import rename_source_key

        renamed = rename_source_key(name, self._renamings, self._converters, self._prefix, self._own)
        if renamed[0] in self._own or name not in self._own:
            return renamed
        return rename_source_key(name, [], [], self._prefix, self._own)
