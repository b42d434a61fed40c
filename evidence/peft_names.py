"""Writes docs/peft_names.md: which of PEFT's names exist here, and what to use in place of the others."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import peft.functional
import peft.helpers
import peft.optimizers
import peft.utils.hotswap
from torch import nn

import graphpeft
from graphpeft.absent_names import ABSENT, ABSENT_MEMBERS

PAGE = Path(__file__).parents[1] / "docs" / "peft_names.md"

SUBMODULES: dict[str, ModuleType] = {
    "helpers": peft.helpers,
    "functional": peft.functional,
    "optimizers": peft.optimizers,
    "utils.hotswap": peft.utils.hotswap,
}


def page() -> str:
    """Returns the page."""
    package = [(name, hasattr(graphpeft, name), ABSENT.get(name, "")) for name in sorted(peft.__all__, key=str.lower)]
    there = sum(is_there for _, is_there, _ in package)
    return f"""# PEFT's names

`python evidence/peft_names.py` writes this page; PEFT is {peft.__version__}. The package `graphpeft`
itself has the names of its submodules: `peft.helpers.rescale_adapter_scale` is `graphpeft.rescale_adapter_scale`.

## The package

{there} of the {len(package)} names of `peft.__all__` exist here, with PEFT's arguments and meaning.

{table(package)}

## Submodules

{table(submodule_names())}

## Models and layers

Members of `PeftModel` and of its tuner that users call, and attributes of PEFT's layers.

{table(members(peft.PeftModel, adapted_model(), "PeftModel"))}
{rows((name, False, reason) for name, reason in ABSENT_MEMBERS["layers"].items())}

## Configs

{table(members(peft.PeftConfig, graphpeft.LoraConfig(), "PeftConfig"))}
"""


def adapted_model() -> Any:
    """Returns a model with an adapter."""
    return graphpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), graphpeft.LoraConfig(target_modules=["0"]))


def members(of_peft: type, ours: Any, where: str) -> Iterator[tuple[str, bool, str]]:
    """Yields the public members of a class of PEFT's, whether `ours` has them, and what to use instead."""
    for name in sorted(set(dir(of_peft)) - set(dir(nn.Module))):
        if not name.startswith("_"):
            yield name, hasattr(ours, name), ABSENT_MEMBERS[where].get(name, "")


def submodule_names() -> Iterator[tuple[str, bool, str]]:
    """Yields the functions and classes that submodules of PEFT define, likewise."""
    for where, module in SUBMODULES.items():
        for name, value in sorted(vars(module).items()):
            own = inspect.isfunction(value) or inspect.isclass(value)
            if own and not name.startswith("_") and value.__module__.startswith(module.__name__):
                reasons: Mapping[str, str] = ABSENT_MEMBERS.get(where, {})
                yield f"{where}.{name}", hasattr(graphpeft, name), reasons.get(name, "")


def table(lines: Iterable[tuple[str, bool, str]]) -> str:
    """Returns a table of names."""
    return "| name | here |\n| --- | --- |\n" + rows(lines)


def rows(lines: Iterable[tuple[str, bool, str]]) -> str:
    """Returns the rows of such a table."""
    return "\n".join(f"| `{name}` | {'yes' if is_there else reason} |" for name, is_there, reason in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
