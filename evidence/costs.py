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

FORMER: dict[str, int] = {
    "import: Python modules": 462,
    "import: of Dynamo, Inductor, ONNX, SymPy, NetworkX, Transformers": 1,
    "the first nn.Linear of a process: calls": 5428,
    "the first nn.Linear of a process: files": 61,
    "another nn.Linear: calls": 351,
    "another nn.Linear: files": 32,
    "a further target: LoRA, linear layers: calls": 197,
    "a further target: LoRA, linear layers: recordings": 0,
    "a further target: LoRA, a decoder: calls": 861,
    "a further target: LoRA, a decoder: recordings": 8,
    "a further target: LoRA, blocks with a functional weight: calls": 755,
    "a further target: LoRA, blocks with a functional weight: recordings": 8,
    "a further target: LoRA, blocks that call layers by name: calls": 863,
    "a further target: LoRA, blocks that call layers by name: recordings": 8,
    "load_adapter, 8 linear layers: calls": 1631,
    "load_adapter, 8 linear layers: recordings": 0,
    "set_adapter, 8 linear layers: calls": 347,
    "set_adapter, 8 linear layers: recordings": 0,
    "disable_adapter, 8 linear layers: calls": 243,
    "disable_adapter, 8 linear layers: recordings": 0,
    "save_pretrained, 8 linear layers: calls": 233,
    "save_pretrained, 8 linear layers: recordings": 0,
    "delete_adapter, 8 linear layers: calls": 136,
    "delete_adapter, 8 linear layers: recordings": 0,
    "load_adapter, 8 blocks with a functional weight: calls": 5382,
    "load_adapter, 8 blocks with a functional weight: recordings": 0,
    "set_adapter, 8 blocks with a functional weight: calls": 2848,
    "set_adapter, 8 blocks with a functional weight: recordings": 0,
    "disable_adapter, 8 blocks with a functional weight: calls": 507,
    "disable_adapter, 8 blocks with a functional weight: recordings": 0,
    "save_pretrained, 8 blocks with a functional weight: calls": 698,
    "save_pretrained, 8 blocks with a functional weight: recordings": 0,
    "delete_adapter, 8 blocks with a functional weight: calls": 424,
    "delete_adapter, 8 blocks with a functional weight: recordings": 0,
    "load_adapter, 8 blocks that call layers by name: calls": 27622,
    "load_adapter, 8 blocks that call layers by name: recordings": 8,
    "set_adapter, 8 blocks that call layers by name: calls": 1008,
    "set_adapter, 8 blocks that call layers by name: recordings": 0,
    "disable_adapter, 8 blocks that call layers by name: calls": 891,
    "disable_adapter, 8 blocks that call layers by name: recordings": 0,
    "save_pretrained, 8 blocks that call layers by name: calls": 609,
    "save_pretrained, 8 blocks that call layers by name: recordings": 0,
    "delete_adapter, 8 blocks that call layers by name: calls": 424,
    "delete_adapter, 8 blocks that call layers by name: recordings": 0,
}
"""The counts of commit c715d7a, with PyTorch 2.13."""

VERSIONS = re.compile(r"Counted with Python ([\d.]+) and PyTorch ([\d.]+)\.")


def versions() -> tuple[str, str]:
    """Returns the versions of Python and of PyTorch, without their patches."""
    python, pytorch = (version.split(".")[:2] for version in (platform.python_version(), torch.__version__))
    return ".".join(python), ".".join(pytorch)


def recorded() -> tuple[Rows, bool, bool]:
    """Returns the counts of the page, and whether it was written with this version of Python, and of PyTorch."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \|", text, re.MULTILINE)
    found = VERSIONS.search(text)
    python, pytorch = versions()
    of_python, of_pytorch = found.groups() if found is not None else ("", "")
    counts = {what: int(count.replace(",", "")) for what, count in rows}
    return counts, of_python == python, of_pytorch == pytorch


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
