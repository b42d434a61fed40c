"""How an exported copy of a model is called: with more arguments, and plain containers as what it returns."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def plain(value: Any) -> Any:
    """Returns what a model returns, with dictionaries and tuples in place of a library's own kinds of these.

    So whoever loads the model needs nothing of that library.
    """
    if isinstance(value, Mapping):
        return {key: plain(inside) for key, inside in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else tuple(map(plain, value))
    return value


def let_return_plain(model: nn.Module) -> None:
    """Lets a model's forward return plain containers."""
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(own(*args, **kwargs))

    forward.__dict__["__signature__"] = inspect.signature(own)
    model.__dict__["forward"] = forward


def let_take(
    model: nn.Module, names: tuple[str, ...], around: Callable[..., contextlib.AbstractContextManager[Any]]
) -> None:
    """Gives a model's forward more keyword arguments.

    Args:
        model: The model, whose forward is exchanged.
        names: The names of the arguments.
        around: Makes the context of a call from these arguments.
    """
    own = model.forward
    signature = inspect.signature(own)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        more = {name: kwargs.pop(name) for name in names}
        with around(**more):
            return own(*args, **kwargs)

    fixed = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    taken = [one for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__dict__["__signature__"] = signature.replace(parameters=[*fixed, *added, *taken])
    model.__dict__["forward"] = forward
