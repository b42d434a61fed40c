"""The page of workflows, from a row for each."""

from __future__ import annotations

import collections
import importlib.metadata
import itertools

from verdict import Row

TOOLS = (
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "bitsandbytes",
    "torchao",
    "diffusers",
    "sentence-transformers",
    "lightning",
    "timm",
    "torchvision",
    "torch-geometric",
    "peft",
)


def page(rows: list[Row]) -> str:
    """Returns the page's Markdown."""
    counts = collections.Counter(row.verdict for row in rows)
    counted = "; ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts, key=counts.__getitem__)[::-1])
    versions = ", ".join(f"{tool} {importlib.metadata.version(tool).partition('+')[0]}" for tool in TOOLS)
    sections = "\n".join(
        f"## {tool}\n\n{_HEAD}{''.join(f'{line(row)}' + chr(10) for row in own)}"
        for tool, own in itertools.groupby(rows, key=lambda row: row.workflow.tool)
    )
    return f"""# Workflows

`make integrations` runs {len(rows)} workflows of users with both libraries. Each is one script in
`evidence/workflows/`, which takes the library as an argument. It was run with {versions}.

- *equal*: it holds in both, with the same losses, outputs, names or whatever the script returns, numbers within
  a thousandth.
- *other values*: it holds in both; the reason for other values is told.
- *graphpeft alone*: PEFT's error is told.
- *PEFT alone*: it is refused here; the way out is told.

{counted}.

{sections}"""


_HEAD = "| workflow | verdict | |\n|---|---|---|\n"


def line(row: Row) -> str:
    """Returns a row of a table."""
    error = row.peft.error if row.verdict == "graphpeft alone" else row.graphpeft.error
    why = row.workflow.apart or (row.difference if row.verdict == "other values" else error)
    return f"| {row.workflow.name} | {row.verdict} | {_plain(why)} |"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
