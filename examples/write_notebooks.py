"""Writes the notebooks in `notebooks/` from scripts with cells, which begin with ``# %%``; outputs are left out.

Run it with ``make notebooks`` after a change of such a script.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = ["quickstart", "comparing_methods", "own_rule"]


def cells(script: str) -> Iterator[tuple[str, str]]:
    """Yields the kind and the text of each cell; a script's docstring is the first."""
    docstring, *rest = script.split("\n# %%")
    yield "markdown", f"# {ast.literal_eval(docstring.strip()).splitlines()[0]}"
    for part in rest:
        first, _, text = part.partition("\n")
        if first.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines()]
            yield "markdown", "\n".join(lines)
        else:
            yield "code", text.strip()


def notebook(name: str) -> str:
    """Returns the notebook of a script as JSON in the format 4.5."""
    made: list[dict[str, Any]] = []
    for place, (kind, text) in enumerate(cells((HERE / f"{name}.py").read_text(encoding="utf-8"))):
        cell = {"cell_type": kind, "id": f"{name}-{place}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    content = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in SCRIPTS:
        (HERE / "notebooks" / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
