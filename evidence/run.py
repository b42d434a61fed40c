"""Traces models of timm, torchvision and Transformers, compares each graph with its model, and writes a table.

    python evidence/run.py [names of libraries or of models]

What was measured is kept in build/coverage.jsonl, and not measured again; delete that file to begin anew.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import timm_models
import torch
import torchvision
import torchvision_models
import transformers
import transformers_models
import written_models
from case import Case
from measure import Row, measure
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "build" / "coverage.jsonl"
TABLE = ROOT / "docs" / "coverage.md"
MODELS = (written_models, torchvision_models, transformers_models, timm_models)


def main(wanted: list[str]) -> None:
    """Measures what wasn't yet, and writes the table of all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.touch()
    done = {row["case"] for row in _rows()}
    every = list(
        itertools.chain(
            written_models.cases(), torchvision_models.cases(), transformers_models.cases(), timm_models.cases()
        )
    )
    left = [case for case in every if case.key not in done and _is_wanted(case, wanted)]
    for case in (progress := tqdm(left, unit="model")):
        progress.set_description(case.key)
        with MEASURED.open("a") as file:
            file.write(json.dumps(_measured(case)) + "\n")
    TABLE.write_text(_page(_rows()))
    tqdm.write(f"wrote {TABLE.relative_to(ROOT)}")


def _rows() -> list[Row]:
    return [json.loads(line) for line in MEASURED.read_text().splitlines()]


def _is_wanted(case: Case, wanted: list[str]) -> bool:
    return not wanted or case.library in wanted or case.name in wanted


def _measured(case: Case) -> Row:
    try:
        return measure(case)
    except Exception as error:
        return {"case": case.key, "error": f"can't be measured: {type(error).__name__}: {error}"[:300]}


def _page(rows: list[Row]) -> str:
    versions = {"torch": torch, "timm": timm, "torchvision": torchvision, "transformers": transformers}
    used = ", ".join(f"{name} {library.__version__.partition('+')[0]}" for name, library in versions.items())
    sections = [_section(library, rows) for library in ("timm", "torchvision", "transformers", "hand-written")]
    return f"""# Coverage

`make coverage` traces each model, and compares the graph with it: in evaluation, in training with the same seed, with
another batch size, and with another length or resolution. It was run with {used}, on one thread.

- *equal*: equal bit for bit. *guard*: an error that names the branch which differs from the trace. *model*: an error of
  the model itself, which doesn't accept such inputs.
- *kept*: modules that stay calls in one of the modes; the reasons are below the table.
- *sites*: the linear layers that LoRA adapts, out of all linear layers.
- *×*: the processor time of the trace relative to that of `torch.export.export` in the same process, each measured by
  itself. If the code differs in training, the trace records two graphs, and the export one.

Models of many other packages are adapted, and compared with PEFT's, on [a page of their own](third_party.md).

{"".join(sections)}"""


def _section(library: str, rows: list[Row]) -> str:
    own = sorted((row for row in rows if row["case"].startswith(f"{library}/")), key=lambda row: row["case"].lower())
    if not own:
        return ""
    whole = [row for row in own if "error" not in row and not row["kept"]]
    ratios = [ratio for row in own if (ratio := _ratio(row)) is not None]
    for_each = [ratio / row["graphs"] for row in own if (ratio := _ratio(row)) is not None]
    found, there = (sum(row.get(key, 0) for row in own) for key in ("adaptable", "linears"))
    wrong = sum(bool(_wrong(row)) for row in own)
    lines = [
        f"## {library}",
        "",
        f"{len(whole)} of {len(own)} whole; {wrong} that differ or fail; {found:,} of {there:,} sites; the trace takes "
        f"{_median(ratios)} × the time of `torch.export.export` (median of {len(ratios)}), {_median(for_each)} × for "
        "each graph that it records.",
        "",
        "| model | nodes | guards | kept | eval | train | batch | size | sites | s | × |",
        "|---|--:|--:|--:|---|---|---|---|--:|--:|--:|",
        *(_line(row) for row in own),
        "",
        *(f"- {note}" for row in own for note in _notes(row)),
        "",
    ]
    return "\n".join(lines) + "\n"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else "-"


_COLUMNS = ("eval", "train", "batch", "size")


def _line(row: Row) -> str:
    name = row["case"].partition("/")[2]
    sites = f"{row.get('adaptable', '-')}/{row.get('linears', '-')}"
    ratio = _ratio(row)
    shown = "-" if ratio is None else f"{ratio:.2f}"
    if "error" in row:
        return f"| {name} | - | - | - | error | | | | {sites} | | |"
    verdicts = " | ".join(_short(row[column]) for column in _COLUMNS)
    counts = f"{row['nodes']} | {row['guards']} | {len(row['kept']) or ''}"
    return f"| {name} | {counts} | {verdicts} | {sites} | {row['seconds']:.2f} | {shown} |"


def _short(verdict: str) -> str:
    if verdict.startswith("refused by the model"):
        return "model"
    return verdict.partition(":")[0]


def _ratio(row: Row) -> float | None:
    return row["seconds"] / row["export"] if isinstance(row.get("export"), float) and "error" not in row else None


def _notes(row: Row) -> list[str]:
    name = row["case"].partition("/")[2]
    if "error" in row:
        return [f"{name}: {_plain(row['error'])}"]
    by_reason: dict[str, list[str]] = {}
    for path, reason in (*row["kept"].items(), *row["refused"].items()):
        by_reason.setdefault(reason, []).append(path)
    notes = [f"{paths[0]}{_more(paths)}: {reason}" for reason, paths in by_reason.items()]
    notes += [row["other mode"]] if row["other mode"] else []
    return [f"{name}: {_plain(note)}" for note in (*_wrong(row), *notes)]


def _wrong(row: Row) -> list[str]:
    """Returns where a graph answers otherwise than its model, without a guard's error, and what the trace changed."""
    verdicts = [f"{key}: {row[key]}" for key in _COLUMNS if key in row and not row[key].startswith(_RIGHT)]
    return verdicts + ([f"the model: {row['changed']}"] if row.get("changed") else [])


_RIGHT = ("equal", "guard", "refused by the model")


def _more(paths: list[str]) -> str:
    return f" and {len(paths) - 1} more" if len(paths) > 1 else ""


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
