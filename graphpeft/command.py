"""The command ``graphpeft``: `graphpeft export SOURCE PATH`."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from graphpeft.auto import class_for
from graphpeft.exporting import CARRIERS, FORMATS, ExportError, export
from graphpeft.rules.config import PeftConfig

_FUNCTION = re.compile(r"(?P<module>\w+(\.\w+)*):(?P<function>\w+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: The arguments behind the command's name; None takes those of the process.

    Returns:
        The exit status: 0, or 1 after an error, which is written to stderr as one line.
    """
    options = _parser().parse_args(arguments)
    try:
        model, example_inputs = _loaded(options.source)
        report = export(
            model,
            example_inputs,
            options.path,
            options.format,
            options.adapters,
            dynamic=not options.fixed,
            check=not options.unchecked,
        )
    except (ValueError, RuntimeError, TypeError, OSError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"graphpeft export: {reason}", file=sys.stderr)
        return 1
    print(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graphpeft", description="Adapts PyTorch models with PEFT methods.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "export",
        help="write a model to a file that runs without graphpeft",
        description="Writes a model, adapted or not, to a file that runs without graphpeft, and checks the file.",
    )
    command.add_argument(
        "source",
        help="an adapter of a Transformers model, as a folder or on the Hub, whose config names its base; or "
        "package.module:function, a function that returns (model, example_inputs)",
    )
    command.add_argument("path", help="the file to write; for weights also a folder")
    command.add_argument("--format", default="pt2", choices=FORMATS, help="default: pt2")
    command.add_argument(
        "--adapters", default="merged", choices=CARRIERS, help="how adapters are carried; default: merged"
    )
    command.add_argument("--fixed", action="store_true", help="keep all sizes of the inputs as the example has them")
    command.add_argument("--unchecked", action="store_true", help="don't run and compare what was written")
    return parser


def _loaded(source: str) -> tuple[Any, Any]:
    """Returns a model and its example inputs."""
    named = _FUNCTION.fullmatch(source)
    if named is not None:
        return _made(named["module"], named["function"])
    model = class_for(PeftConfig.from_pretrained(source)).from_pretrained(source)
    example = getattr(model, "dummy_inputs", None)
    if example is None:
        raise ExportError(
            f"a {type(model).__name__} has no dummy_inputs; write a function that returns the model and example "
            "inputs, and name it as package.module:function"
        )
    # an exported program can't return a cache
    caches = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return model, {**example, **caches}


def _made(module: str, function: str) -> tuple[Any, Any]:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as for python -m
    torch.manual_seed(0)
    made = getattr(importlib.import_module(module), function)()
    if not isinstance(made, tuple) or len(made) != 2:
        raise ExportError(
            f"{module}:{function} returned {type(made).__name__}; it is to return (model, example_inputs)"
        )
    return made
