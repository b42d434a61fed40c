"""The lines of a graph's code that compute given nodes, for errors."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

_MOST_LINES = 12


def lines_of(nodes: Iterable[fx.Node], graph: fx.Graph) -> str:
    """Returns the lines of code that compute nodes, indented; nodes without a line of their own are left out."""
    source = graph.python_code("self").src.splitlines()
    lines = [line for node in nodes if (line := _line_of(node.name, source))]
    more = [f"… and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(f"    {line}" for line in lines[:_MOST_LINES] + more)


def _line_of(name: str, source: Iterable[str]) -> str:
    line = next((line.strip() for line in source if re.match(rf"\s*{re.escape(name)}( : [^=]+)? = ", line)), "")
    return line.partition(";  ")[0]  # the rest of the line only deletes variables
