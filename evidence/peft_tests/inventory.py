"""Writes down what PEFT's modules contain, as JSON, so that another process can stand in for PEFT without loading it.

python inventory.py FILE
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main(path: str) -> None:
    """Writes, for each of PEFT's modules, a row for each of its names."""
    import peft

    for module in pkgutil.walk_packages(peft.__path__, "peft."):
        # those for libraries that aren't installed can't be imported, by tests neither
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"}
    Path(path).write_text(json.dumps({name: _rows(module) for name, module in modules.items()}))


def _rows(module: ModuleType) -> dict[str, Any]:
    rows = {name: _row(value) for name, value in vars(module).items() if not name.startswith("__")}
    return {name: row for name, row in rows.items() if row is not None} | _version(module)


def _version(module: ModuleType) -> dict[str, Any]:
    return {"__version__": {"value": module.__version__}} if hasattr(module, "__version__") else {}


def _row(value: Any) -> dict[str, Any] | None:
    if inspect.ismodule(value):
        return {"module": value.__name__}
    if inspect.isclass(value):
        return _row_of_class(value) if _is_pefts(value) else _outside(value)
    if inspect.isfunction(value):
        return {"function": value.__name__} if _is_pefts(value) else _outside(value)
    with contextlib.suppress(TypeError, ValueError):
        return {"value": json.loads(json.dumps(value))}
    return {"object": type(value).__name__}


def _row_of_class(cls: type) -> dict[str, Any]:
    kind = _kind(cls)
    # tests choose configs by the options that their classes take
    options = list(inspect.signature(cls).parameters) if kind == "config" else []
    return {"class": cls.__name__, "kind": kind, "options": options}


def _is_pefts(value: Any) -> bool:
    return value.__module__.partition(".")[0] == "peft"


def _outside(value: Any) -> dict[str, Any]:
    return {"from": value.__module__, "name": value.__qualname__}


def _kind(cls: type) -> str:
    if cls.__name__.endswith("Config"):
        return "config"
    return "enum" if issubclass(cls, enum.Enum) else "exception" if issubclass(cls, Exception) else "class"


if __name__ == "__main__":
    main(sys.argv[1])
