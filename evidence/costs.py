"""Writes docs/costs.md: what calls cost, in numbers that are the same on each machine.

`make costs` writes it, with tests/counting.py; tests/test_costs.py compares it.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from counting import GROUPS, Rows, fresh
from tqdm import tqdm

PAGE = Path(__file__).parents[1] / "docs" / "costs.md"

_HEAD = """\
# Costs

The costs of calls, in numbers that are the same on each machine with the versions below, so that a test can hold them.
`make costs` counts them and writes this page. `tests/test_costs.py` fails where a number is another one than here (an
operation in a thousand is allowed, and the growth to the 50th may be anything up to 105 %). So the difference of this
page in a change is what the change costs, and no number should rise.

*Calls* are calls of functions of this package, and *files* those that these functions are in; *recordings* are forwards
that were recorded as graphs; *operations* are operators of PyTorch, those that operators call among them. A further
target is the difference between a model with 12 parts and one with 4, by their targets. The decoder is a Llama without
rotary embeddings, of PyTorch's layers alone; the Llama is one of Transformers.

Counted with Python {python}, PyTorch {torch} and Transformers {transformers}. The second number is the count at commit
c715d7a, with PyTorch 2.13, where it was counted. Higher counts since pay for names like PEFT's, checks of saved files,
changes that are undone as a whole, and checks for exchanged and resized modules.
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

VERSIONS = re.compile(r"Counted with Python ([\d.]+), PyTorch ([\d.]+) and Transformers ([\d.]+)\.")


def versions() -> list[str]:
    """Returns the versions of Python, PyTorch and Transformers, without their patches."""
    found = platform.python_version(), metadata.version("torch"), metadata.version("transformers")
    return [".".join(version.split(".")[:2]) for version in found]


def recorded() -> tuple[dict[str, Rows], list[bool]]:
    """Returns the tables of the page, and whether it was written with these versions of the three."""
    head, *tables = PAGE.read_text(encoding="utf-8").split("\n## ")
    found = VERSIONS.search(head)
    then = found.groups() if found is not None else ("", "", "")
    rows = {
        table.partition("\n")[0]: {
            what: int(count.replace(",", ""))
            for what, count in re.findall(r"^\| (.+?) \| ([\d,]+) \|", table, re.MULTILINE)
        }
        for table in tables
    }
    return rows, [now == before for now, before in zip(versions(), then, strict=True)]


def page(tables: Mapping[str, Rows]) -> str:
    """Returns the page."""
    python, pytorch, transformers = versions()
    head = _HEAD.format(python=python, torch=pytorch, transformers=transformers)
    return head + "".join(_table(title, rows) for title, rows in tables.items())


def _table(title: str, rows: Rows) -> str:
    lines = [f"| {what} | {count:,} | {_former(what)} |\n" for what, count in rows.items()]
    return f"\n## {title}\n\n| what | now | c715d7a |\n|---|--:|--:|\n" + "".join(lines)


def _former(what: str) -> str:
    return f"{FORMER[what]:,}" if what in FORMER else ""


if __name__ == "__main__":
    PAGE.write_text(page({group: fresh(group) for group in tqdm(GROUPS, unit="table")}), encoding="utf-8")
