"""The page about PEFT's tests, from a row for each."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import reasons

Rows = dict[str, dict[str, Any]]


def page(in_scope: dict[str, list[str]], rows: Rows, version: str) -> str:
    """Returns the page's Markdown."""
    sections = "\n".join(_section(part, tests, rows) for part, tests in in_scope.items() if tests)
    return f"""# PEFT's own tests

`make peft-tests` runs the tests of PEFT {version} with graphpeft in the place of `peft`. In scope are those that pass
with PEFT, on a CPU and without a hub. Models are tiny and have random weights, under the names that the tests load.

{sections}"""


def _section(part: str, in_scope: list[str], rows: Rows) -> str:
    files = {_file(test) for test in rows}
    ran = [rows.get(test) or _not_found(test) for test in in_scope if _file(test) in files]
    passed = [row for row in ran if row["outcome"] == "passed"]
    vacuous = sum(bool(row.get("asked")) for row in passed)
    failures = [(row, reasons.reason(row)) for row in ran if row["outcome"] != "passed"]
    apart = sum(reason.kind in reasons.APART for _, reason in failures)
    rest = len(ran) - apart
    return f"""## {part[0].upper()}{part[1:]}

**{len(passed):,} of {len(ran):,} pass: {_share(len(passed), len(ran))}.** {vacuous:,} of the tests that pass look for
instances of PEFT's wrapper classes, and there are none here. {rest:,} tests neither look into PEFT's wrappers and
functions nor compare wording; {_share(len(passed), rest)} of these pass.

### By file

| file | in scope | pass | share |
|---|--:|--:|--:|
{_by_file(ran)}

### By reason

{_by_kind(failures)}
"""


def _file(test: str) -> str:
    return Path(test.partition("::")[0]).stem


def _not_found(test: str) -> dict[str, Any]:
    return {"test": test, "outcome": "failed", "error": "not found: its parameters have other names", "in_test": ""}


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _by_file(ran: list[dict[str, Any]]) -> str:
    groups = collections.defaultdict(list)
    for row in ran:
        groups[_file(row["test"])].append(row["outcome"] == "passed")
    return "\n".join(
        f"| {file} | {len(each):,} | {sum(each):,} | {_share(sum(each), len(each))} |"
        for file, each in sorted(groups.items())
    )


def _by_kind(failures: list[tuple[dict[str, Any], reasons.Reason]]) -> str:
    sections = []
    for kind in reasons.KINDS:
        own = [(row, reason) for row, reason in failures if reason.kind == kind]
        if own:
            sections.append(f"#### {len(own):,}: {kind}\n\n{_by_text(own)}\n")
    return "\n".join(sections)


def _by_text(own: list[tuple[dict[str, Any], reasons.Reason]]) -> str:
    groups = collections.defaultdict(list)
    for row, reason in own:
        groups[reason.text].append(row["test"])
    lines = ["| tests | what | for example |", "|--:|---|---|"]
    for text, tests in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        lines.append(f"| {len(tests):,} | {_plain(text)} | `{_plain(_short(tests[0]))}` |")
    return "\n".join(lines)


def _short(test: str) -> str:
    return test.removeprefix("tests/").replace(".py::", "::").partition("[")[0]


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]
