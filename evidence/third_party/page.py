"""The page of third-party models, from what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib import metadata

from measure import Row

TOLERANCES = {"double": 1e-9, "single": 1e-4}
"""How far apart values may be that count as equal, in relation to the largest number, by precision."""

COLUMNS = {
    "outputs": "outputs",
    "training": "training",
    "files": "files",
    "second": "two adapters",
    "own file": "saved",
    "state": "state",
    "merged": "merged",
    "copied": "copied",
}


def page(rows: list[Row], notes: dict[str, str]) -> str:
    """Returns the page's Markdown.

    Args:
        rows: What was measured.
        notes: What there is to say of cases, by their keys.
    """
    packages = list(dict.fromkeys(_package(row) for row in rows))
    of_packages = {_package(row): row["version"] for row in rows}
    tools = {name: metadata.version(name).partition("+")[0] for name in ("torch", "peft")}
    versions = ", ".join(f"{name} {version}" for name, version in {**tools, **of_packages}.items())
    whole = sum(all(_cell(row, name) in ("equal", "-") for name in COLUMNS) and not _wrong(row) for row in rows)
    with_both = [row for row in rows if _cell(row, "outputs") not in ("-", "fails")]
    sections = [_section(package, rows, notes) for package in packages]
    return f"""# Third-party models

`make third-party` adapts {len(rows)} models from {len(packages)} packages, which know nothing of adapters: in place,
without example inputs, by LoRA on all linear layers, and on convolutions, too, in some of them. Weights are random, and
the adapters' values are changed as by training. {len(with_both)} of the models run with PEFT, too, as far as it adapts
them. In {whole} nothing differs; for the others, the reason is told.

- *sites*: how many layers PEFT and graphpeft adapt by the same config.
- *gradients*: of the adapter's tensors, those that have a gradient in training, or whose weight has none in the base.
- *outputs*, *training*, *files*, *two adapters*: equal to PEFT's. These are outputs; the gradients of a training step,
  and the losses of two; outputs with the other library's file, both ways; outputs with a second adapter of another
  rank, with the first again, and with none.
- *saved*: a loaded adapter gives the same outputs. *state*: the state dict has every tensor of the base by its name,
  and the adapter's; once the adapter is taken off, the state dict, all classes and the outputs are the base's.
- *merged*: the merged model has the adapted one's outputs, and the base's names and classes. *copied*: a deep copy has
  the same outputs.

*equal* is within 1e-9 of the largest number in double precision, or within 1e-4 in single precision, where a model runs
in no other (*s*). *fails*: PEFT, or PyTorch with the base itself, raises the error that is told below the table.
*refused*: graphpeft refuses, with the reason.

<details><summary>Versions</summary>{versions}</details>

{"".join(sections)}"""


def _section(package: str, rows: list[Row], notes: dict[str, str]) -> str:
    own = [row for row in rows if _package(row) == package]
    lines = [
        f"## {package}",
        "",
        f"| model | sites: PEFT | here | gradients | {' | '.join(COLUMNS.values())} |",
        f"|---|--:|--:|--:|{'---|' * len(COLUMNS)}",
        *(_line(row) for row in own),
        "",
        *(f"- {_name(row)}: {_plain(note)}" for row in own for note in (*_notes(row), notes.get(row["case"])) if note),
        "",
    ]
    return "\n".join(lines) + "\n"


def _package(row: Row) -> str:
    return row["case"].partition("/")[0]


def _name(row: Row) -> str:
    return row["case"].partition("/")[2]


def _line(row: Row) -> str:
    precision = " (s)" if row.get("dtype") == "single" else ""
    sites = row.get("sites") or {}
    counts = [
        str(len(found)) if (found := sites.get(library)) is not None else "-" for library in ("peft", "graphpeft")
    ]
    trained = row.get("trained")
    gradients = "-"
    if trained:
        alive = trained["tensors"] - len(trained["wrongly"])
        gradients = f"{alive}/{trained['tensors']}"
    return f"| {_name(row)}{precision} | {' | '.join((*counts, gradients, *(_cell(row, name) for name in COLUMNS)))} |"


def _cell(row: Row, name: str) -> str:
    error = row.get("errors", {}).get(name)
    if error is not None:
        return "refused" if error.startswith("AdaptError") else "fails"
    if row.get(name) is None:
        return "-"
    value = row[name]
    wrong = value if name == "state" else value.get("wrong") if isinstance(value, dict) else None
    worst = max(_distances(value), default=0.0)
    return "differ" if wrong else "equal" if worst <= TOLERANCES[row["dtype"]] else f"{worst:.0e}"


def _distances(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(_distances(part) for name, part in value.items() if name != "change")


def _wrong(row: Row) -> list[str]:
    """Returns what graphpeft does wrong, or can't do."""
    errors = row.get("errors", {})
    found = [f"here: {errors['graphpeft']}"] if "graphpeft" in errors else []
    if row.get("trained") and row["trained"]["wrongly"]:
        found.append(f"no gradient at {_listed(row['trained']['wrongly'])}")
    return found


def _notes(row: Row) -> list[str]:
    """Returns sentences that explain a row."""
    notes = _wrong(row)
    by_text: dict[str, list[str]] = {}
    for check, error in row.get("errors", {}).items():
        if check != "graphpeft":
            by_text.setdefault(error, []).append(check)
    notes += [f"{_who(checks, error)}: {error}" for error, checks in by_text.items()]
    notes += [f"{reason}: {_listed(paths)}" for reason, paths in (row.get("apart") or {}).items()]
    if row.get("unused by peft"):
        notes.append(
            f"PEFT's adapter has no effect at {_listed(row['unused by peft'])}: the weight is read without a call, or "
            "the layer is held in another place, too; the comparison leaves that out"
        )
    if _cell(row, "outputs") not in ("equal", "-", "fails") and _cell(row, "merged in peft") == "equal":
        notes.append(
            "PEFT's outputs change when its adapter is merged, and are then those that are here before and after. "
            "Before, it adds to what layers return: without their mask, or to none where PyTorch's fast path runs"
        )
    without = (row.get("trained") or {}).get("without gradient")
    if without and not row["trained"]["wrongly"]:
        notes.append(f"the base gives the weight of {_listed(_sites_of(without))} no gradient, either")
    return notes


def _who(checks: list[str], error: str) -> str:
    if error.startswith("AdaptError"):
        return "here"
    if checks == ["copied"]:
        return "the base itself"
    return "PEFT, when it merges" if checks == ["merged in peft"] else "PEFT"


def _sites_of(names: list[str]) -> list[str]:
    return sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names})


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"`{names[0]}`{more}"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:330]
