"""Functions in a model's code that draw from Python's or NumPy's random generator; each becomes one call node.

Speech models draw the masks of SpecAugment this way. The call draws anew in each run, as the model does. A module whose
own code draws stays a call.
"""

from __future__ import annotations

import random
import sys
from types import FunctionType, MethodType
from typing import Any

from graphpeft.code.source import names_in


def draws(target: Any) -> bool:
    """Returns whether a node's target is a function whose code names Python's or NumPy's random generator."""
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
