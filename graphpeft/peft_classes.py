"""Makes objects of this library instances of PEFT's classes, too, wherever a process has loaded PEFT.

trl, accelerate, Transformers and others ask ``isinstance(model, peft.PeftModel)``. Python asks an object's type first,
and then its ``__class__``. That is a property here, which returns a subclass of the type with PEFT's class at the end
of its method resolution order. So the object is an instance of PEFT's class and inherits nothing from it. This library
never imports PEFT: the property looks whether somebody has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def model_class(task_type: str | None) -> type | None:
    """Returns PEFT's class for models of a task, `PeftModelForCausalLM` for example; None if PEFT isn't loaded."""
    return _of_table("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", task_type, "PeftModel")


def config_class(method: str) -> type | None:
    """Returns PEFT's config class of a method, `PeftConfig` for one that PEFT lacks; None if PEFT isn't loaded."""
    return _of_table("PEFT_TYPE_TO_CONFIG_MAPPING", method, "PeftConfig")


def hint_for_peft(theirs: type | None, name: str) -> str:
    """Returns words for an error about an attribute of a config that PEFT's class may have, and this library's not."""
    if not hasattr(theirs, name):
        return ""
    return (
        ", which PEFT's config has. If PEFT asks for it, since its get_peft_model or trl was given this config, adapt "
        "the model by graphpeft.get_peft_model(model, config) and pass that in its place"
    )


def _of_table(table: str, key: str | None, default: str) -> type | None:
    # a module that is being imported lacks some of its names
    loaded = vars(sys.modules["peft"]) if "peft" in sys.modules else {}
    return loaded.get(table, {}).get(key, loaded.get(default))


def class_property(theirs: Callable[[Any], type | None]) -> property:
    """Returns a property that serves as the `__class__` of a class, which has the attribute `KNOWN`, too: None.

    Args:
        theirs: Returns PEFT's class for instances of a class, or None.
    """

    def get(instance: Any) -> type:
        own: Any = type(instance)
        # no more than attributes of the class are read, so that a compiler can follow
        known = own._graphpeft_known_class
        if known is not None and issubclass(known, own):
            return known
        if "peft" not in sys.modules or torch.compiler.is_compiling():
            return own
        other = theirs(own)
        if other is None or issubclass(own, other):
            return own
        both = _both(own, other)
        setattr(own, KNOWN, both)
        return both

    return property(get, lambda instance, cls: _CLASS.__set__(instance, cls))


KNOWN = "_graphpeft_known_class"
"""The attribute of a class that has the `__class__` of its instances, once PEFT is loaded."""

_CLASS: Any = vars(object)["__class__"]
"""Python's own `__class__`, which can be set."""


@functools.lru_cache(maxsize=256)
def _both(own: type, theirs: type) -> type:
    def mro(cls: Any) -> list[type]:
        order = [*type.mro(cls)]
        return [*order, *(base for base in theirs.__mro__ if base not in order)]

    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        # who builds another object of an object's __class__ wants one of its type
        return own(*args, **kwargs)

    meta: Any = type(type(own).__name__, (type(own),), {"mro": mro, "__call__": call})
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return meta(own.__name__, (own,), names)
