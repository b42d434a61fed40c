"""Runs other libraries as oracles of the files that are written for them, and writes docs/stacks_tried.md.

python evidence/stacks/run.py
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import logging
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import experts
import torch
import with_mlx

_PAGE = Path(__file__).parents[2] / "docs" / "stacks_tried.md"
_EQUAL = 1e-5
"""The greatest relative difference of numbers that count as equal in single precision."""


def main() -> None:
    """Measures all, and writes the page; the exit status is 1 if something differs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    of_mlx, of_experts = list(with_mlx.rows()), list(experts.rows())
    _PAGE.write_text(page(of_mlx, of_experts), encoding="utf-8")
    tried = [row for row in of_experts if not row.note]
    wrong = [row.kind for row in tried if row.deviation > _EQUAL or not row.is_written]
    wrong += [f"{row.model}, {row.kind}" for row in of_mlx if row.deviation > _EQUAL]
    told = (
        f"{len(tried)} models with experts, {len(of_mlx)} adapters in mlx-lm; differing: {', '.join(wrong) or 'none'}"
    )
    sys.stdout.write(f"{told}\n")
    sys.exit(bool(wrong))


def page(of_mlx: list[with_mlx.Row], of_experts: list[experts.Row]) -> str:
    """Returns the page's Markdown."""
    tried = [row for row in of_experts if not row.note]
    models = list(dict.fromkeys(row.model for row in of_mlx))
    by_kind = {kind: {row.model: row.deviation for row in of_mlx if row.kind == kind} for kind in with_mlx.KINDS}
    lines = [
        "# Other libraries' files",
        "",
        "`make stacks` runs other libraries as oracles. A number is the largest difference of a logit, relative to the",
        "largest logit; models have random weights, and adapters random values.",
        "",
        "## mlx-lm",
        "",
        f"{with_mlx.versions()}, on the CPU: adapters that `save_adapter` has written, beside the logits here.",
        "",
        f"| kind | {' | '.join(models)} |",
        f"| --- |{' --- |' * len(models)}",
        *(f"| {kind} | {' | '.join(_number(of.get(model)) for model in models)} |" for kind, of in by_kind.items()),
        "",
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
        ),
        "",
        "Not tried, with the reason:",
        "",
        *(f"- {row.kind}: {row.note.replace('|', '/')}" for row in of_experts if row.note),
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _bits(row: experts.Row) -> str:
    return "bit for bit" if row.is_written else "other bits"


if __name__ == "__main__":
    main()
