"""Methods that a model has only while it has adapters that need them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


class _Available:
    """A method that an object has while a condition holds.

    Args:
        function: The method.
        condition: The condition, a function of the object.
    """

    def __init__(self, function: Callable[..., Any], condition: Callable[[Any], bool]) -> None:
        self.__wrapped__, self._condition = function, condition
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self.__wrapped__
        if not self._condition(instance):
            raise AttributeError(f"{owner.__name__} has no {self.__wrapped__.__name__} with its present adapters")
        return types.MethodType(self.__wrapped__, instance)


def available_if(condition: Callable[[Any], bool]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a method one that an object has while a condition holds, so that `hasattr` tells.

    Args:
        condition: The condition, a function of the object.
    """
    return lambda function: _Available(function, condition)
