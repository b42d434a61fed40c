"""Makes objects of this library instances of PEFT's classes, too, wherever a process has loaded PEFT.

trl, accelerate, Transformers and others ask ``isinstance(model, peft.PeftModel)``. Python asks an object's type first,
and then its ``__class__``, which is a property here. Once somebody has loaded PEFT, an adapted model has a class, and a
config answers with a class, whose method resolution order ends in PEFT's. So the object is an instance of PEFT's class
and inherits nothing from it. This library never imports PEFT.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


def model_class(task_type: str | None) -> type | None:
    """Returns PEFT's class for models of a task, `PeftModelForCausalLM` for example; None if PEFT isn't loaded."""
    return _of_table("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", task_type, "PeftModel")


def config_class(method: str) -> type | None:
    """Returns PEFT's config class of a method, `PeftConfig` for one that PEFT lacks; None if PEFT isn't loaded."""
    return _of_table("PEFT_TYPE_TO_CONFIG_MAPPING", method, "PeftConfig")


def tuner_classes() -> dict[str, Any]:
    """Returns PEFT's table of the classes of its methods, an empty one if PEFT isn't loaded."""
    return vars(sys.modules["peft"]).get("PEFT_TYPE_TO_TUNER_MAPPING", {}) if "peft" in sys.modules else {}


def hint_for_peft(theirs: type | None, name: str) -> str:
    """Returns words for an error about an attribute of a config that PEFT's class may have, and this library's not."""
    # a field whose default is made anew is no attribute of the class
    if not hasattr(theirs, name) and name not in getattr(theirs, "__dataclass_fields__", {}):
        return ""
    return (
        ", which PEFT's config has. If PEFT asks for it, since its get_peft_model or trl was given this config, adapt "
        "the model by graphpeft.get_peft_model(model, config) and pass that in its place"
    )


def _of_table(table: str, key: str | None, default: str) -> type | None:
    # a module that is being imported lacks some of its names
    loaded = vars(sys.modules["peft"]) if "peft" in sys.modules else {}
    return loaded.get(table, {}).get(key, loaded.get(default))


def set_class(instance: Any, cls: type) -> None:
    """Sets the type of an object whose `__class__` is a property."""
    vars(object)["__class__"].__set__(instance, cls)


def ending_in(order: list[type], last: tuple[type, ...]) -> list[type]:
    """Returns a method resolution order with some classes, and what they derive from, at its end."""
    return [*order, *dict.fromkeys(base for cls in last for base in cls.__mro__ if base not in order)]


def class_in_peft(config: Any) -> type:
    """Returns the type of a config, or a subclass of it that is one of PEFT's config class, too, if PEFT is loaded."""
    # one that is made for a method, and of no method's class, has no options of it
    own, theirs = type(config), config_class("" if "peft_type" in vars(config) else config.method)
    return own if theirs is None else _both(own, theirs)


@functools.lru_cache(maxsize=256)
def _both(own: type, theirs: type) -> type:
    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        # who builds another object of an object's __class__ wants one of its type
        return own(*args, **kwargs)

    def mro(cls: Any) -> list[type]:
        return ending_in(type.mro(cls), (theirs,))

    meta: Any = type("type", (type,), {"mro": mro, "__call__": call})
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return meta(own.__name__, (own,), names)
