"""What is exported: one plain module that calls a model, with more arguments, and with plain containers as results."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from graphpeft.exporting.errors import ExportError


class Root(nn.Module):
    """A module that has a model's tensors and modules by the same names, and calls it.

    PyTorch's exporter goes through the graph of an ``fx.GraphModule`` node by node, whatever its forward does besides;
    and what is added to a call here isn't the model's.

    Args:
        model: The model.
        names: The names of keyword arguments that its forward doesn't have.
        around: Makes the context of a call from these.

    Raises:
        ExportError: If its forward has an argument of one of these names.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...] = (),
        around: Callable[..., contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        taken = [name for name in names if name in inspect.signature(model.forward).parameters]
        if taken:
            raise ExportError(
                f"the forward of the {type(model).__name__} has an argument {taken[0]!r} itself, which is the name of "
                "what an export takes beside the model's own; rename that, or use adapters='baked'"
            )
        # the very dictionaries, so that the exporter's tensors, which it puts into them, are those that the model reads
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = model.__dict__[kind]
        self.training = model.training

        def forward(*args: Any, **kwargs: Any) -> Any:
            more = {name: kwargs.pop(name) for name in names}
            with around(**more):
                return plain(model(*args, **kwargs))

        forward.__dict__["__signature__"] = _with(inspect.signature(model.forward), names)
        self.__dict__["forward"] = forward

    def name_arguments(self, names: Iterable[str]) -> None:
        """Lets the signature name these keyword arguments in place of taking any, as PyTorch's exporter wants it."""
        signature = inspect.signature(self.forward)
        unnamed = tuple(name for name in names if name not in signature.parameters)
        fixed = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        self.forward.__dict__["__signature__"] = _with(signature.replace(parameters=fixed), unnamed)


def _with(signature: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    fixed = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    taken = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    return signature.replace(parameters=[*fixed, *added, *taken])


def plain(value: Any) -> Any:
    """Returns what a model returns, with dictionaries and tuples in place of a library's own kinds of these.

    So whoever loads the model needs nothing of that library.
    """
    if isinstance(value, Mapping):
        return {key: plain(inside) for key, inside in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else tuple(map(plain, value))
    return value
