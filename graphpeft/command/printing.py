"""What subcommands print: a table for people, or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from graphpeft.wording import text_table

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
"""The option of each subcommand that tells something."""


def tell(told: Mapping[str, Any], as_json: bool, text: object = None) -> None:
    """Prints what a subcommand has found out.

    Args:
        told: It, by name.
        as_json: Whether to print it as JSON.
        text: What to print for people; None prints a line for each name.
    """
    if as_json:
        click.echo(json.dumps(told, indent=2, ensure_ascii=False, default=str))
    elif text is not None:
        click.echo(text)
    else:
        rows = [(name.replace("_", " "), _shown(value)) for name, value in told.items()]
        click.echo("\n".join(line for line in text_table(("", ""), rows)[2:]))


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)
