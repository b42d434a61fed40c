"""The command ``graphpeft``, a file for each subcommand."""

from __future__ import annotations

from graphpeft.command.main import graphpeft, main

__all__ = ["graphpeft", "main"]
