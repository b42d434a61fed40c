"""The output of subcommands: a table for people, or JSON for programs."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, TextIO

import click

from graphpeft.wording import text_table

_ANSWER: ContextVar[TextIO | None] = ContextVar("answer", default=None)
"""Where `tell` prints; None for the standard output."""


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a subcommand the option ``--json``; all that is printed but by `tell` goes to stderr.

    A model's code may print, too, and no program could read that among JSON.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        token = _ANSWER.set(sys.stdout)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return command(*args, **kwargs)
        finally:
            _ANSWER.reset(token)

    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(run)


def tell(told: Mapping[str, Any], as_json: bool, text: object = None) -> None:
    """Prints what a subcommand has found out."""
    place = _ANSWER.get() or sys.stdout
    encoding = getattr(place, "encoding", None) or "utf-8"
    if as_json:
        shown = json.dumps(told, indent=2, ensure_ascii=False, default=str)
        if not _fits(shown, encoding):
            shown = json.dumps(told, indent=2, default=str)
    elif text is not None:
        shown = str(text)
    else:
        rows = [(name.replace("_", " "), _shown(value)) for name, value in told.items()]
        shown = "\n".join(line for line in text_table(("", ""), rows)[2:])
    # a pipe of Windows may have an encoding without the lines of tables
    click.echo(shown.encode(encoding, "replace").decode(encoding), file=place)


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
