"""Runs other libraries as oracles of the files that are written for them, and writes docs/stacks_tried.md.

python evidence/stacks/run.py
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import logging
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import experts
import torch
import with_llama_cpp
import with_mlx
from adapted import KINDS, Row

_PAGE = Path(__file__).parents[2] / "docs" / "stacks_tried.md"
_EQUAL = 1e-5
"""The greatest relative difference of numbers that count as equal in single precision."""


def main() -> None:
    """Measures all, and writes the page; the exit status is 1 if something differs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    oracles = {
        Oracle("mlx-lm", with_mlx.versions(), "mlx"): list(with_mlx.rows()),
        Oracle("llama.cpp", with_llama_cpp.versions(), "gguf"): list(with_llama_cpp.rows()),
    }
    of_experts = list(experts.rows())
    _PAGE.write_text(page(oracles, of_experts), encoding="utf-8")
    tried = [row for row in of_experts if row.is_tried]
    wrong = [row.kind for row in tried if row.note or not _is_equal(row.effect, row.deviation) or not row.is_written]
    of_oracles = [row for rows in oracles.values() for row in rows]
    wrong += [
        f"{row.model}, {row.kind}"
        for row in of_oracles
        if row.deviation is not None and not _is_equal(row.effect, row.deviation)
    ]
    told = f"{len(tried)} models with experts, {len(of_oracles)} adapters in other libraries"
    sys.stdout.write(f"{told}; differing: {', '.join(wrong) or 'none'}\n")
    sys.exit(bool(wrong))


class Oracle(NamedTuple):
    """A library that runs: its title, its versions, and the name of its stack."""

    title: str
    versions: str
    stack: str


def _is_equal(effect: float, deviation: float) -> bool:
    return effect > 0.01 and deviation <= _EQUAL  # never of NaN


def page(oracles: Mapping[Oracle, list[Row]], of_experts: list[experts.Row]) -> str:
    """Returns the page's Markdown."""
    tried = [row for row in of_experts if row.is_tried]
    lines = [
        "# Other libraries' files",
        "",
        "`make stacks` runs other libraries as oracles. A number is the largest difference of a logit, relative to the",
        "largest logit; models have random weights, and adapters random values, which change logits by",
        f"{min(row.effect for rows in oracles.values() for row in rows):.2f} at least.",
        "",
        *(line for oracle, rows in oracles.items() for line in _table(oracle, rows)),
        "## Experts by the names of checkpoints",
        "",
        f"transformers {version('transformers')}: adapters with factors for each expert's matrix.",
        "The other side is the checkpoint with the changes in its matrices, as Transformers loads it.",
        "*Effect*: the difference from the base.",
        '*Written*: `stack="transformers4"` writes the same file.',
        "",
        "| model | matrices | effect | deviation | written |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row.kind} | {row.matrices} | {row.effect:.2f} | {_number(row.deviation)} | {_bits(row)} |"
            for row in tried
            if not row.note
        ),
        "",
        "Failed, or not tried, with the reason:",
        "",
        *(f"- {row.kind}: {_why(row)}" for row in of_experts if row.note),
        "",
    ]
    return "\n".join(lines)


def _table(oracle: Oracle, rows: list[Row]) -> list[str]:
    models = list(dict.fromkeys(row.model for row in rows))
    kinds = dict.fromkeys([*KINDS, *(row.kind for row in rows)])
    by_kind = {kind: {row.model: row for row in rows if row.kind == kind} for kind in kinds}
    return [
        f"## {oracle.title}",
        "",
        f'{oracle.versions}, on the CPU: adapters that `save_adapter(stack="{oracle.stack}")` has written, beside the',
        "logits here. Those that are read were written by the library itself.",
        "",
        f"| kind | {' | '.join(models)} |",
        f"| --- |{' --- |' * len(models)}",
        *(f"| {kind} | {' | '.join(_cell(of.get(model)) for model in models)} |" for kind, of in by_kind.items()),
        "",
    ]


def _cell(row: Row | None) -> str:
    return "-" if row is None else "refused" if row.deviation is None else _number(row.deviation)


def _number(value: float) -> str:
    return "equal" if value == 0 else f"{value:.0e}"


def _why(row: experts.Row) -> str:
    note = row.note.replace("|", "/")
    return f"FAILED: {note}" if row.is_tried else note


def _bits(row: experts.Row) -> str:
    return "bit for bit" if row.is_written else "other bits"


if __name__ == "__main__":
    main()
