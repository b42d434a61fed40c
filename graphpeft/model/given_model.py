"""A model that a caller gives: a module of its own code, and none that PEFT has wrapped or changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph import in_place
from graphpeft.graph.paths import modules_by_path
from graphpeft.rules.config import PeftConfig
from graphpeft.wording import shown

_CLASSES_OF_PEFT = {
    "peft.peft_model": "PeftModel",
    "peft.mixed_model": "PeftMixedModel",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
    "peft.utils.other": "AuxiliaryTrainingWrapper",
}
"""The classes of all modules that PEFT puts into a model, or around one, by the Python modules that define them."""


def check_model(model: object) -> None:
    """Raises an error for what can't be adapted, whatever the config."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {_no_module(model)}")
    classes = tuple(_classes_of_peft())
    if not classes:
        return
    # not the class of a model that is adapted here, which is one of PEFT's, too
    own = ((path, in_place.original_class(inner)) for path, inner in modules_by_path(model).items())
    path, cls = next(((path, cls) for path, cls in own if issubclass(cls, classes)), ("", None))
    if cls is not None:
        raise AdaptError(
            f"{path or 'the model'} is a {cls.__name__} of PEFT, which adapts the model already: take PEFT's adapters "
            "off with its merge_and_unload() or unload(), which return the base model, or load that anew, and adapt "
            "it; a saved adapter of PEFT is loaded by PeftModel.from_pretrained(model, folder) of graphpeft"
        )


def _classes_of_peft() -> Iterator[type]:
    """Yields those that somebody has imported: without them, no module is an instance of one."""
    for module, name in _CLASSES_OF_PEFT.items():
        cls = getattr(sys.modules.get(module), name, None)
        if isinstance(cls, type):
            yield cls


def _no_module(given: object) -> str:
    if isinstance(given, type) and issubclass(given, nn.Module):
        name = given.__name__
        return f"the class {name}; pass an instance, as {name}(…) or {name}.from_pretrained(…) make one"
    if isinstance(given, PeftConfig):
        return f"a {type(given).__name__}; pass the model first: get_peft_model(model, config)"
    if isinstance(given, str | os.PathLike):
        return (
            f"{shown(given)}; load that model first and pass it: get_peft_model(model, config), or "
            "PeftModel.from_pretrained(model, folder) for a saved adapter"
        )
    return f"a {type(given).__name__}; pass an nn.Module"
