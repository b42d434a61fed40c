"""Tells how many tests each tier has, and how many of the lines that all tests run are run by its tests.

python evidence/tiers.py [--again FILE]
"""

from __future__ import annotations

import argparse
import sqlite3
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

from coverage.numbits import numbits_to_nums, numbits_union

ROOT = Path(__file__).parents[1]
DATABASE = ROOT / "build" / "tiers.coverage"

OTHERS = "not long and not compiled and not integrations and not browser"
TIERS = {"quick": f"quick and {OTHERS}", "test": f"not full and {OTHERS}", "test-all": OTHERS}
"""The markers of each tier, by its target of make; the last one is whole."""

Lines = dict[str, bytes]
"""The numbers of lines by their file, as the tool coverage packs them."""

SHARE = 0.99
"""The least share of the lines that all tests run which the sample has to run."""


def main(database: Path) -> None:
    """Writes a row for each tier, and the lines that only the whole runs; fails if these are too many."""
    tests = {tier: _tests_of(expression) for tier, expression in TIERS.items()}
    lines = {tier: _run_by(database, of_tier) for tier, of_tier in tests.items()}
    [*_, whole] = TIERS
    sys.stdout.write(f"{'tier':<10}{'tests':>8}{'functions':>11}{'lines':>9}{'of all':>9}\n")
    for tier, of_tier in tests.items():
        functions = {test.partition("[")[0] for test in of_tier}
        counts = f"{len(of_tier):>8,}{len(functions):>11,}{_count(lines[tier]):>9,}"
        sys.stdout.write(f"{tier:<10}{counts}{_count(lines[tier]) / _count(lines[whole]):>9.2%}\n")
    for file, numbers in sorted(lines[whole].items()):
        missed = {*numbits_to_nums(numbers)} - {*numbits_to_nums(lines["test"].get(file, b""))}
        if missed:
            sys.stdout.write(f"only test-all runs {file}: {', '.join(map(str, sorted(missed)))}\n")
    if _count(lines["test"]) < SHARE * _count(lines[whole]):
        sys.exit(f"the sample runs less than {SHARE:.0%} of the lines")


def _tests_of(expression: str) -> frozenset[str]:
    """Returns the ids of the tests that an expression of markers selects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", expression]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return frozenset(line for line in printed.splitlines() if "::" in line)


def _run_by(database: Path, tests: Set[str]) -> Lines:
    """Returns the lines that tests run, and those that run as the package is imported."""
    found: Lines = {}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT path, context, numbits FROM line_bits JOIN file ON file.id = file_id "
            "JOIN context ON context.id = context_id"
        )
        for path, context, numbers in rows:
            # a context is the id of a test, with |setup, |run or |teardown; none as modules are imported
            if not context or context.rpartition("|")[0] in tests:
                found[path] = numbits_union(found.get(path, b""), numbers)
    return found


def _count(lines: Lines) -> int:
    return sum(len(numbits_to_nums(numbers)) for numbers in lines.values())


def record(database: Path) -> None:
    """Runs all tests, and writes which lines each runs."""
    database.parent.mkdir(exist_ok=True)
    contexts = ["--cov=graphpeft", "--cov-context=test", "--cov-report="]
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", *contexts]
    subprocess.run(command, cwd=ROOT, check=True)
    (ROOT / ".coverage").rename(database)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=Path, metavar="FILE", help="a database of coverage with contexts, as of a run")
    given = parser.parse_args().again
    if given is None:
        record(DATABASE)
    main(given or DATABASE)
