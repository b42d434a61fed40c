"""Functions of the model's code that draw from Python's or NumPy's generator: each is one call of the graph.

Models of speech draw the masks of SpecAugment so. A call of the function draws anew in each run, as the model does;
a module whose own code draws stays a call.
"""

from __future__ import annotations

import random
import sys
from types import FunctionType, MethodType
from typing import Any

from graphpeft.code.source import names_in


def draws(target: Any) -> bool:
    """Returns whether what a node calls is a function that names Python's or NumPy's generator of random numbers."""
    if type(target) is not FunctionType:
        return False
    numpy = sys.modules.get("numpy")
    names = names_in(target.__code__).read
    named = [target.__globals__.get(name) for name in names]
    return any(value is not None and _is_generator(value, names, numpy) for value in named)


def _is_generator(value: Any, names: frozenset[str], numpy: Any) -> bool:
    if type(value) is MethodType:
        return issubclass(type(value.__self__), random.Random)
    return value is random or (numpy is not None and (value is numpy.random or (value is numpy and "random" in names)))
