"""Runs each workflow with PEFT and with graphpeft, and writes docs/workflows.md; fails if one holds in PEFT alone.

python evidence/workflows/run.py [modules, as with_trl]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import page
from tqdm import tqdm
from verdict import Outcome, Row, failed
from workflow import MODULES, workflows

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "workflows.md"
LIBRARIES = ("peft", "graphpeft")
MINUTES = 10  # that a module's workflows may take in one library


def main(wanted: list[str]) -> None:
    """Runs them, says which went wrong, and writes the page if all ran."""
    modules = wanted or list(MODULES)
    with ThreadPoolExecutor(max_workers=2) as two:
        both = {
            (module, library): two.submit(_outcomes, library, module) for module in modules for library in LIBRARIES
        }
        for future in tqdm(both.values(), unit="process"):
            future.result()
    rows = [
        Row(each, *(both[module, library].result().get(each.name, _LOST) for library in LIBRARIES))
        for module in modules
        for each in workflows(module)
    ]
    for row in rows:
        tqdm.write(page.line(row))
    if not wanted:
        PAGE.write_text(page.page(rows), encoding="utf-8")
    if wrong := [row for row in rows if failed(row)]:
        sys.exit("\n".join(f"{row.workflow.name}: {row.graphpeft.error or row.verdict}" for row in wrong))


_LOST = Outcome(error="its process ended before")


def _outcomes(library: str, module: str) -> dict[str, Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        lines.touch()
        log = HERE.parents[1] / "build" / "workflows" / f"{module}-{library}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "one_library.py"), library, module, str(lines)]
        with log.open("w", encoding="utf-8") as output:
            try:
                subprocess.run(command, stdout=output, stderr=output, timeout=60 * MINUTES, check=False)
            except subprocess.TimeoutExpired:
                tqdm.write(f"{module} took more than {MINUTES} minutes with {library}")
        rows = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
        return {row["workflow"]: Outcome(row.get("values"), row.get("error", "")) for row in rows}


if __name__ == "__main__":
    main(sys.argv[1:])
