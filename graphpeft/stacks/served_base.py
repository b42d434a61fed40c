"""The GGUF file of a base model, which tells where the matrices of its checkpoint are: their names, and their rows.

The ``gguf`` package gives the names. llama.cpp reorders the rows of some weights, such as Llama's queries and keys, so
the file's rows are compared with the model's. The comparison knows no architecture, and refuses another base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.stacks.experts import name_of_stack, of_expert
from graphpeft.wording import shortened

ARCHITECTURE = "general.architecture"
TABLE, HEAD = "token_embd.weight", "output.weight"
"""The names of the table of embeddings and of the head, which is the table where a file has none of its own."""

_EXACT = ("F32", "F16", "BF16")
_LEAST_ALIKE = 0.999, 0.9
"""The least cosine of two rows that are the same, of exact and of quantised numbers: of Q2_K, it is 0.95."""
_SAMPLED = 256
"""The greatest number of rows that are compared with all others at once."""
_MOST_SCALED = 1.01, 1.15
"""The greatest ratio of the sizes of two matrices that are the same, of exact and of quantised numbers."""


class Gguf(NamedTuple):
    """The contents of a GGUF file, or of a model's several files.

    Attributes:
        path: Its path.
        values: The metadata that are single values or strings, and all of an adapter.
        tensors: The tensors by name, as the package's reader gives them.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor as PyTorch has it, (out, in) or (experts, out, in)."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def numbers(self, name: str, matrix: int | None = None) -> Tensor:
        """Returns a tensor of the file, or a matrix of a stack, in single precision."""
        from gguf import quants

        found = self.tensors[name]
        try:
            numbers = quants.dequantize(found.data if matrix is None else found.data[matrix], found.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name} is quantised as {found.tensor_type.name}, which the gguf package doesn't read; "
                "name the base's file in BF16 or Q8_0"
            ) from error
        return torch.tensor(numbers).float()


def read_gguf(path: Path) -> Gguf:
    """Reads a GGUF file, and the other parts of a model where it is one of several.

    Raises:
        CheckpointError: If the file can't be read, or the ``gguf`` package isn't installed.
    """
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError as error:
        raise CheckpointError("llama.cpp's files need gguf: pip install graphpeft[gguf]") from error
    files = _parts(path)
    values: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    try:
        for file in files:
            reader = GGUFReader(file)
            of_one = {
                key: each
                for key, each in reader.fields.items()
                if each.types and (each.types[0] != GGUFValueType.ARRAY or key.startswith("adapter."))
            }
            values |= {key: field.contents() for key, field in of_one.items()}
            tensors |= {tensor.name: tensor for tensor in reader.tensors}
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    except Exception as error:  # of the reader, on whatever bytes it meets
        raise CheckpointError(f"{path} is no GGUF file, or a damaged one: {shortened(str(error))}") from error
    return Gguf(path, values, tensors)


def _parts(path: Path) -> list[Path]:
    """Returns all files of a model, given one of them."""
    numbered = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if numbered is None:
        return [path]
    before, count = numbered.groups()
    return [path.with_name(f"{before}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


class ServedBase(NamedTuple):
    """The base as llama.cpp has it.

    Attributes:
        file: The file.
        architecture: The name of its architecture.
        names: The ``gguf`` package's map from a checkpoint's names to llama.cpp's.
    """

    file: Gguf
    architecture: str
    names: Any

    def name_of(self, name: str) -> str:
        """Returns the name of the tensor that has a checkpoint's matrix: of a stack for an expert's."""
        found = self._named(name)
        if found is None:
            raise CheckpointError(f"llama.cpp's {self.architecture} has no place for {name}; leave it out, or merge")
        if found not in self.file.tensors:
            why = "ties the head to the table" if found == HEAD else "may have it joined with others"
            raise CheckpointError(
                f"{self.file.path} has no {found}, which {name} is: it {why}; leave it out, or merge the adapter, and "
                "convert the merged model"
            )
        return found

    def _named(self, name: str) -> str | None:
        place = of_expert(name)
        parts = (name if place is None else name_of_stack(place)).split(".")
        # the names that llama.cpp knows begin further inside, without "bert." or "language_model."
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        found = next(filter(None, map(self.names.get_name, tails)), None)
        return None if found is None else f"{found}.weight"

    def checkpoint_names(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Returns the names of a checkpoint's matrices by the tensors that have them, a stack's in its order."""
        found: dict[str, list[str]] = {}
        for name in names:
            if (tensor := self._named(name)) in self.file.tensors and tensor is not None:
                found.setdefault(tensor, []).append(name)
        return {tensor: sorted(own, key=_number_of) for tensor, own in found.items()}

    def refuse_tied(self, name: str) -> None:
        """Raises CheckpointError for a change of the table if the head is the same tensor."""
        if HEAD not in self.file.tensors:
            raise CheckpointError(
                f"{self.file.path} ties the head to {name}, and llama.cpp would take the table's factors for the "
                "head's; leave it out, or merge the adapter, and convert the merged model"
            )

    def rows_of(self, name: str, own: Sequence[Tensor]) -> Tensor:
        """Returns the number of the model's row that lies at each row of the file.

        Args:
            name: The name of the checkpoint's matrix.
            own: The matrix in the model; its transpose, too, where it may lie the other way round.

        Raises:
            CheckpointError: If the file has another matrix.
        """
        place, tensor = of_expert(name), self.name_of(name)
        sizes = self.file.shape(tensor)
        number, is_exact = None if place is None else place.number, self.file.tensors[tensor].tensor_type.name in _EXACT
        if len(sizes) == 2 if number is None else len(sizes) == 3 and number < sizes[0]:
            for matrix in [each for each in own if tuple(each.shape) == sizes[-2:]]:
                order = _order(matrix.detach().float().cpu(), self.file.numbers(tensor, number), is_exact)
                if order is not None:
                    return order
        raise CheckpointError(
            f"{self.file.path}: {tensor} of shape {sizes} has other numbers than the model's {name} of shape "
            f"{tuple(own[0].shape)}, or rows that are alike; unmerge adapters, and name the file of the base that the "
            "adapter was trained on"
        )


def _number_of(name: str) -> int:
    place = of_expert(name)
    return 0 if place is None else place.number


def served_base(path: Path) -> ServedBase:
    """Reads the GGUF file of a base.

    Raises:
        CheckpointError: If the file can't be read, or has another thing than a model.
    """
    file = read_gguf(path)
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    named = file.values.get(ARCHITECTURE)
    architecture = next((key for key, name in MODEL_ARCH_NAMES.items() if name == named), None)
    blocks = file.values.get(f"{named}.block_count")
    if architecture is None or not isinstance(blocks, int):
        raise CheckpointError(
            f"{path} is no model of an architecture that the gguf package knows, but {named!r}; name the base's own "
            "file, or update gguf"
        )
    return ServedBase(file, str(named), get_tensor_name_map(architecture, blocks))


def _order(own: Tensor, served: Tensor, exact: bool) -> Tensor | None:
    """Returns the rows of the model in the order of the file, or None if these are others."""
    least, most = (each[0 if exact else 1] for each in (_LEAST_ALIKE, _MOST_SCALED))
    ratio = served.norm() / own.norm()
    if not 1 / most < ratio < most:
        return None
    ours, theirs = _directions(own), _directions(served)
    sample = torch.arange(0, len(own), math.ceil(len(own) / _SAMPLED))
    alike, nearest = (theirs[sample] @ ours.T).max(dim=1)
    if not bool((alike >= least).all()):
        return None
    # rows may be alike in another order, too; few are equal, as of tokens that no text has
    if bool(((ours * theirs).sum(1) >= least).all()) and bool((nearest == sample).float().mean() >= 0.5):
        return torch.arange(len(own))
    nearest_of = [(part @ ours.T).max(dim=1) for part in theirs.split(_SAMPLED)]
    alike, order = torch.cat([each.values for each in nearest_of]), torch.cat([each.indices for each in nearest_of])
    return order if bool((alike >= least).all()) and len(order.unique()) == len(own) else None


def _directions(matrix: Tensor) -> Tensor:
    """Returns rows of length 1; rows of zeros, as of padding, have a direction of their own."""
    return torch.cat([F.normalize(matrix, dim=1), (matrix == 0).all(1, keepdim=True)], dim=1)
