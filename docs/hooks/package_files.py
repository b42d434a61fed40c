"""Adds the page of the package's files, each with the first line of its docstring, to the site that MkDocs builds."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parents[2] / "graphpeft"


def on_files(files: Files, config: Any) -> Files:
    """Adds the page; MkDocs calls this when it has found all others."""
    files.append(File.generated(config, "files.md", content=page()))
    return files


def page() -> str:
    """Returns the page: a table for each room."""
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    found = sorted(files, key=lambda path: (_room(path), path))
    # for developers of the package, so behind the pages for its users in the site's search
    text = ["---\nsearch:\n  boost: 0.2\n---", "# Files", "The first line of each file's docstring, by room."]
    for room, paths in itertools.groupby(found, _room):
        rows = [f"| `{path.as_posix()}` | {_about(path)} |" for path in paths]
        text.append(
            "\n".join(
                [f"## {room}/" if room else "## Files in no room", "", "| file | is about |", "| --- | --- |", *rows]
            )
        )
    return "\n\n".join(text) + "\n"


def _room(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def _about(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")
