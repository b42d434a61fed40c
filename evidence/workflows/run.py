"""Runs each workflow with PEFT and with graphpeft, and writes docs/workflows.md; fails if one holds in PEFT alone.

python evidence/workflows/run.py [modules, as with_trl_sft]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import page
from tqdm import tqdm
from verdict import Outcome, Row, failed
from workflow import MODULES, workflows

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "workflows.md"
LIBRARIES = ("peft", "graphpeft")
LOGS = HERE.parents[1] / "build" / "workflows"
MINUTES = 20  # that a module's workflows may take in both
LONGEST = ("with_sharding_trainers", "with_processes")  # they begin, so that no process works alone at the end


def main(wanted: list[str]) -> None:
    """Runs them, says which went wrong, and writes the page if all ran."""
    modules = wanted or list(MODULES)
    LOGS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=3) as pool:
        longest_first = sorted(modules, key=lambda module: module not in LONGEST)
        list(tqdm(pool.map(_run, longest_first), total=len(modules), unit="module"))
    rows = []
    for module in modules:
        both = [_outcomes(module, library) for library in LIBRARIES]
        rows += [Row(each, *(found.get(each.name, _LOST) for found in both)) for each in workflows(module)]
    for row in rows:
        tqdm.write(page.line(row))
    if not wanted:
        PAGE.write_text(page.page(rows), encoding="utf-8")
    if wrong := [row for row in rows if failed(row)]:
        sys.exit("\n".join(f"{row.workflow.name}: {row.graphpeft.error or row.verdict}" for row in wrong))


_LOST = Outcome(error="its process ended before")


def _run(module: str) -> None:
    """Runs a module's workflows with both libraries."""
    for library in LIBRARIES:
        _lines(module, library).unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "one_module.py"), module, str(LOGS), *LIBRARIES]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            process.wait(60 * MINUTES)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            tqdm.write(f"{module} took more than {MINUTES} minutes")


def _outcomes(module: str, library: str) -> dict[str, Outcome]:
    lines = _lines(module, library)
    rows = map(json.loads, lines.read_text(encoding="utf-8").splitlines()) if lines.exists() else ()
    return {row["workflow"]: Outcome(row.get("values"), row.get("error", "")) for row in rows}


def _lines(module: str, library: str) -> Path:
    return LOGS / f"{module}-{library}.jsonl"


if __name__ == "__main__":
    main(sys.argv[1:])
