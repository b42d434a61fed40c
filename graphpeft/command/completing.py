"""Completions that a shell offers for arguments: files, folders and names of methods."""

from __future__ import annotations

import click

from graphpeft.rules.plain_values import plain
from graphpeft.rules.registry import registered

# neither is asked whether it exists: an adapter may be on the Hub, and a model has other names, too
PLACE = click.Path()
FOLDER = click.Path(file_okay=False)


def methods(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    """Returns the names of the methods that begin so."""
    return [name for name in sorted(map(plain, registered())) if name.startswith(begun.upper())]
