"""The example inputs of an export: their names, and the same inputs in other sizes.

PyTorch's exporter fixes dimensions of size 1. So the trace widens these dimensions, all of them or only the first of
each tensor, unless the model accepts no other size. Inputs of other sizes repeat the example's values along a
dimension, so that ids, masks and positions stay valid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphpeft._torch import pytree
from graphpeft.exporting.errors import ExportError

Shape = tuple[int, ...]


class Example(NamedTuple):
    """The inputs of one call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> Example:
        """Returns the example for a tuple of positional or a dict of keyword arguments."""
        if isinstance(example_inputs, Mapping):
            example = cls((), dict(example_inputs))
        elif isinstance(example_inputs, tuple):
            example = cls(example_inputs, {})
        else:
            raise ExportError(
                f"example_inputs is {type(example_inputs).__name__}; pass a tuple of positional arguments, as in (x,), "
                "or a dict of keyword arguments"
            )
        if not example.tensors:
            raise ExportError("example_inputs has no tensor; pass what the model is called with")
        return example

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of an exported program's inputs."""
        return [leaf for leaf in pytree.tree_leaves(tuple(self)) if isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the tensors."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    @property
    def batch(self) -> int:
        """The first size of the first tensor; 1 for a tensor without dimensions."""
        return next(iter(self.tensors[0].shape), 1)

    def with_(self, **more: Any) -> Example:
        """Returns the example with additional keyword arguments."""
        return Example(self.args, {**self.kwargs, **more})

    def sized(self, shapes: Sequence[Shape]) -> Example:
        """Returns the example with tensors of the given shapes; their values are repeated or cut off."""
        wanted = iter(shapes)
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: _sized(tensor, next(wanted)), tuple(self))
        return Example(args, kwargs)

    def apart(self) -> Example:
        """Returns the example with a tensor of its own for each input.

        PyTorch's exporter takes a tensor that is given twice for one input, and computes with the last one.
        """
        seen: set[int] = set()

        def own(tensor: Tensor) -> Tensor:
            is_new = id(tensor) not in seen
            seen.add(id(tensor))
            return tensor if is_new else tensor.clone()

        args, kwargs = pytree.tree_map_only(Tensor, own, tuple(self))
        return Example(args, kwargs)

    def call(self, function: Callable[..., Any]) -> Any:
        """Calls a function without gradients on copies of the inputs, so that the function may write into them."""
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, tuple(self))
            return function(*args, **kwargs)


def _sized(tensor: Tensor, shape: Shape) -> Tensor:
    if not tensor.numel():
        return tensor.new_zeros(shape)  # an empty tensor has no values to repeat
    for dim, size in enumerate(shape):
        if size != tensor.shape[dim]:
            tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
    return tensor


def names(function: Callable[..., Any], example: Example, keyed: Collection[str] = ()) -> list[str]:
    """Returns a name for each tensor of an example: the argument's name, then keys and indices inside the argument."""
    bound = inspect.signature(function).bind(*example.args, **example.kwargs)
    positional = [name for name in bound.arguments if bound.signature.parameters[name].kind in _POSITIONAL]
    found = []
    for path, leaf in pytree.tree_leaves_with_path(tuple(example)):
        if isinstance(leaf, Tensor):
            kind, own, *inside = [_key(entry) for entry in path]
            first = own if kind == 1 else positional[own] if own < len(positional) else f"args.{own}"
            found.append(".".join(map(str, inside if first in keyed else (first, *inside))))
    return found


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _key(entry: Any) -> Any:
    return next(getattr(entry, name) for name in ("idx", "key", "name") if hasattr(entry, name))


def wider(model: Callable[..., Any], example: Example) -> Iterator[Example]:
    """Yields the example with dimensions of size 1 widened, if the model accepts these sizes, and last the example."""
    everywhere = tuple(tuple(max(size, 2) for size in shape) for shape in example.shapes)
    in_front = tuple((*(max(size, 2) for size in shape[:1]), *shape[1:]) for shape in example.shapes)
    for shapes in dict.fromkeys((everywhere, in_front)):
        if shapes != example.shapes and can_call(model, example.sized(shapes)):
            yield example.sized(shapes)
    yield example


def can_call(model: Callable[..., Any], example: Example) -> bool:
    """Returns whether a call of a model with an example raises no error."""
    try:
        example.call(model)
    except Exception:  # a model's code may raise any, as a ZeroDivisionError for a size of 1
        return False
    return True
