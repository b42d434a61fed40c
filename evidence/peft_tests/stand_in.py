"""A pytest plugin that puts graphpeft in the place of PEFT: `import peft` gives its objects by PEFT's names.

What graphpeft has comes from it, under PEFT's names and modules. What both would take from elsewhere, as checks of
installed libraries, comes from PEFT's own file. All other names are there, too, so that a file of tests can be
imported; whoever uses one gets an error with the name that is missing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Modules of PEFT that don't know its methods; they are run from PEFT's own files.
NEUTRAL = ("peft.import_utils",)

# Names that graphpeft has in other modules than PEFT.
ELSEWHERE = {"preprocess_corda": "graphpeft", "PromptLearningConfig": "graphpeft.methods.prompts.prompt_config"}


def _get_submodules(model: Any, key: str) -> tuple[Any, Any, str]:
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _is_targeted(config: Any, name: str) -> bool:
    targets = importlib.import_module("graphpeft.targeting.targets")
    return bool(targets.match(config.target_options, name))


# Functions of PEFT's that know nothing of its methods, written anew, and one that graphpeft has in other words.
NEUTRAL_FUNCTIONS: dict[str, Any] = {
    "infer_device": lambda: "cpu",
    "_get_submodules": _get_submodules,
    "check_target_module_exists": _is_targeted,
}


class MissingNameError(Exception):
    """A test used a name of PEFT's that graphpeft doesn't have."""


# The missing classes that the tests have asked for instances of, since somebody emptied the set.
asked: set[str] = set()


class _Missing(type):
    """The class of stand-ins for classes, which have no instances; a use of one is an error."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        if vars(cls)["kind"] != "config":
            raise MissingNameError(cls.__name__)
        # files of tests make configs of other methods where they list their cases
        return _MissingObject(cls.__name__)

    def __instancecheck__(cls, _: Any) -> bool:
        if vars(cls)["kind"] != "config":
            asked.add(cls.__name__)
        return False

    def __subclasscheck__(cls, other: type) -> bool:
        return other is cls

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingNameError(cls.__name__)


class _MissingObject:
    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise MissingNameError(self.__name__)

    def __getitem__(self, _: Any) -> Any:
        raise MissingNameError(self.__name__)

    def __iter__(self) -> Any:
        raise MissingNameError(self.__name__)

    def __contains__(self, _: Any) -> bool:
        raise MissingNameError(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingNameError(self.__name__)


class _StandIn(ModuleType):
    """A module whose names are looked up when they are asked for.

    So `vars(module)` is empty, by which graphpeft finds that PEFT isn't loaded.
    """

    def __init__(self, name: str, rows: dict[str, Any]) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__dict__["_rows"] = rows

    def __getattr__(self, name: str) -> Any:
        row = self.__dict__["_rows"].get(name)
        if row is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self.__dict__["_found"].setdefault(name, _object(self.__name__, name, row))

    def __dir__(self) -> list[str]:
        return sorted(self.__dict__["_rows"])


_made: dict[str, Any] = {}


def _object(module: str, name: str, row: dict[str, Any]) -> Any:
    if "module" in row:
        return importlib.import_module(row["module"])
    own = _own(module, name) or NEUTRAL_FUNCTIONS.get(name)
    if own is not None:
        return own
    if "value" in row:
        return row["value"]
    if "from" in row:
        return getattr(importlib.import_module(row["from"]), row["name"])
    return _made.setdefault(name, _missing(name, row))


def _missing(name: str, row: dict[str, Any]) -> Any:
    if "class" not in row:
        return _MissingObject(name)
    options = [inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY) for option in row["options"]]
    return _Missing(name, (), {"kind": row["kind"], "__signature__": inspect.Signature(options)})


def _own(module: str, name: str) -> Any:
    """Returns what graphpeft has by this name, in its module of the same name or at its top; None if it has none."""
    path = f"graphpeft{module.removeprefix('peft')}"
    for candidate in dict.fromkeys((path, "graphpeft", ELSEWHERE.get(name, "graphpeft"))):
        try:
            found = getattr(importlib.import_module(candidate), name, None)
        except ImportError:
            continue
        if found is not None and not isinstance(found, ModuleType):
            return found
    return None


def install() -> None:
    """Puts the stand-ins of all of PEFT's modules into `sys.modules`."""
    modules = json.loads(Path(os.environ["PEFT_TESTS_INVENTORY"]).read_text())
    origin = importlib.util.find_spec("peft")
    assert origin is not None
    assert origin.origin is not None
    folder = Path(origin.origin).parent
    for name, rows in modules.items():
        stand_in = _StandIn(name, rows)
        stand_in.__dict__["_found"] = {}
        sys.modules[name] = stand_in
    for name in NEUTRAL:
        _run_from_file(name, folder.joinpath(*name.split(".")[1:]).with_suffix(".py"))


def _run_from_file(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


install()
