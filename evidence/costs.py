"""Writes docs/costs.md: what calls cost, in numbers that are the same on each machine.

`make costs` writes it, with tests/counting.py; tests/test_costs.py compares it.
"""

from __future__ import annotations

import platform
import re
import warnings
from pathlib import Path

import torch
from counting import Rows, all_rows

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"

_HEAD = """\
# Costs

What calls cost, in numbers that are the same on each machine, so that a test can hold them. `make costs` counts them
and writes this page. `tests/test_costs.py` fails where a number is higher than here, and where it has fallen and the
page still has the old one. So the difference of this page in a change is what the change costs.

*Calls* are calls of functions of this package, *recordings* are forwards that were recorded as graphs, *operations* are
operators of PyTorch. A further target is the difference between a model with 12 parts and one with 4, by their targets.
Costs that don't depend on the number of adapters aren't listed twice: the test compares each call on a model with 50
adapters to the same call with 2.

Counted with Python {python} and PyTorch {torch}. The second number is that of commit c715d7a, the leanest one, where it
has the same calls.

| what | now | c715d7a |
|---|--:|--:|
"""

FORMER: dict[str, int] = {}
"""The counts of commit c715d7a, with PyTorch 2.13."""

VERSIONS = re.compile(r"Counted with Python ([\d.]+) and PyTorch ([\d.]+)\.")


def versions() -> tuple[str, str]:
    """Returns the versions of Python and of PyTorch, without their patches."""
    python, pytorch = (version.split(".")[:2] for version in (platform.python_version(), torch.__version__))
    return ".".join(python), ".".join(pytorch)


def recorded() -> tuple[Rows, bool]:
    """Returns the counts of the page, and whether it was written with these versions of Python and PyTorch."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \|", text, re.MULTILINE)
    found = VERSIONS.search(text)
    return {
        what: int(count.replace(",", "")) for what, count in rows
    }, found is not None and found.groups() == versions()


def page(rows: Rows) -> str:
    """Returns the page."""
    python, pytorch = versions()
    lines = [f"| {what} | {count:,} | {_former(what)} |\n" for what, count in rows.items()]
    return _HEAD.format(python=python, torch=pytorch) + "".join(lines)


def _former(what: str) -> str:
    return f"{FORMER[what]:,}" if what in FORMER else ""


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PAGE.write_text(page(all_rows()), encoding="utf-8")
