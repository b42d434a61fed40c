"""The module to export, which calls a model with additional arguments and returns plain containers.

It has the model's very dictionaries of tensors, so a program's weights have the base's names, and the model's hooks
run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from graphpeft.exporting.errors import ExportError


class Root(nn.Module):
    """A module around a model, with the model's tensors and submodules under the same names.

    PyTorch's exporter gets this module instead of the model, since the exporter would interpret an ``fx.GraphModule``
    node by node, without its hooks, and since the model doesn't take the additional arguments.
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
        # shares the model's dictionaries, since the exporter replaces tensors in them, which the model must read
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = model.__dict__[kind]
        self.training = model.training

        def forward(*args: Any, **kwargs: Any) -> Any:
            further = {name: kwargs.pop(name) for name in names}
            with around(**further):
                return in_plain_containers(model(*args, **kwargs))

        forward.__dict__["__signature__"] = _with(inspect.signature(model.forward), names)
        self.__dict__["forward"] = forward

    def name_arguments(self, names: Iterable[str]) -> None:
        """Replaces ``**kwargs`` in the forward's signature by these keyword arguments, as the exporter requires."""
        signature = inspect.signature(self.forward)
        unnamed = tuple(name for name in names if name not in signature.parameters)
        fixed = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        self.forward.__dict__["__signature__"] = _with(signature.replace(parameters=fixed), unnamed)


def _with(signature: inspect.Signature, names: tuple[str, ...]) -> inspect.Signature:
    fixed = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    taken = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    return signature.replace(parameters=[*fixed, *added, *taken])


def in_plain_containers(value: Any) -> Any:
    """Returns a model's result with dictionaries and tuples instead of container classes of a library.

    So loading the exported file doesn't need this library.
    """
    if isinstance(value, Mapping):
        return {key: in_plain_containers(inside) for key, inside in value.items()}
    if isinstance(value, tuple | list):
        kind = type(value) if type(value) in (tuple, list) else tuple
        return kind(map(in_plain_containers, value))
    return value
