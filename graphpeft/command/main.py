"""The command ``graphpeft`` with its subcommands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import click

from graphpeft.command.adapters import convert, info, merge
from graphpeft.command.models import explain, export, show, trace, verify
from graphpeft.peft_errors import PeftWarning

UNDONE, UNREADABLE = 1, 2
"""Exit codes: something can't be done; files or arguments can't be read."""

COMPLETES = "_GRAPHPEFT_COMPLETE"
"""The variable by which a shell asks for what completes a line; it gives no arguments then."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("graphpeft"), prog_name="graphpeft")
def graphpeft() -> None:
    """Adapts PyTorch models with PEFT methods.

    A MODEL is one of

    \b
      timm:NAME          a model of timm with first weights
      hf:PATH            a Transformers model, in a folder or on the Hub
      FOLDER             an adapter, on the base that its config names
      package.module:f   a function that returns a model, or (model, example_inputs)

    Exit codes: 0; 1 if something can't be done; 2 if a file or an argument can't be read.
    """


for command in (info, explain, show, trace, verify, merge, convert, export):
    graphpeft.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given and COMPLETES not in os.environ:
        context = click.Context(graphpeft, info_name="graphpeft", **graphpeft.context_settings)
        click.echo(graphpeft.get_help(context), err=True)
        return UNREADABLE
    try:
        with _warnings_of(_name(given)):
            return graphpeft.main(given, prog_name="graphpeft", complete_var=COMPLETES, standalone_mode=False) or 0
    except click.exceptions.Abort:
        return _told(given, "interrupted", UNDONE)
    except click.ClickException as error:
        return _told(given, error.format_message(), UNREADABLE)
    except (ValueError, RuntimeError, TypeError, OSError, ImportError, AttributeError) as error:
        return _told(given, str(error) or type(error).__name__, UNDONE)
    except Exception as error:  # of code that the command was given: the text of a KeyError is the key alone
        return _told(given, f"{type(error).__name__}: {error}".removesuffix(": "), UNDONE)


@contextlib.contextmanager
def _warnings_of(name: str) -> Iterator[None]:
    """Prints each warning of this library once, on one line, without file and line number."""
    usual, told = warnings.formatwarning, set[str]()

    def formatted(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        if issubclass(category, PeftWarning):
            line = f"{name}: warning: {_one_line(str(message))}\n"
            is_new = line not in told
            told.add(line)
            return line if is_new else ""
        return usual(message, category, *args, **kwargs)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _told(given: Sequence[str], reason: str, code: int) -> int:
    line = _one_line(reason)
    if "--json" in given:
        click.echo(json.dumps({"error": line}))
    click.echo(f"{_name(given)}: {line}", err=True)
    return code


def _name(given: Sequence[str]) -> str:
    return " ".join(["graphpeft", *[word for word in given if word in graphpeft.commands][:1]])


def _one_line(text: str) -> str:
    return " ".join(text.split())
