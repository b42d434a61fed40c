"""Workflows: scripts of users, which run as they stand with either library.

A workflow is a function of a library, `peft` or `graphpeft`, and of an empty folder. It asserts what its user counts
on, and returns values that both libraries must agree on: numbers, texts, and lists and dicts of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

Values = dict[str, Any]
Script = Callable[[ModuleType, Path], Values]


class Workflow(NamedTuple):
    """What a user does with an adapted model and a tool.

    Attributes:
        tool: The tool, as the page names it.
        name: The user's aim with it.
        script: Does it.
        apart: Why the libraries' values differ, if they do and should; or what to do here, if PEFT alone can do it.
    """

    tool: str
    name: str
    script: Script
    apart: str = ""


MODULES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("with_*.py")))


def workflows(module: str) -> list[Workflow]:
    """Returns the workflows of one of `MODULES`, in the order of its source."""
    return [item.workflow for item in vars(importlib.import_module(module)).values() if hasattr(item, "workflow")]


def part(library: ModuleType, path: str) -> Any:
    """Returns what PEFT has in a submodule, as `helpers.rescale_adapter_scale`, and graphpeft itself has."""
    module, _, name = path.rpartition(".")
    return getattr(library if hasattr(library, name) else importlib.import_module(f"{library.__name__}.{module}"), name)


def workflow(tool: str, name: str, *, apart: str = "") -> Callable[[Script], Script]:
    """Returns a decorator that makes a function a workflow."""

    def mark(script: Script) -> Script:
        script.workflow = Workflow(tool, name, script, apart)  # type: ignore[attr-defined]
        return script

    return mark
