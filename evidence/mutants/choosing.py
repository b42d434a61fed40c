"""Chooses the tests that can see a fault: those that run its lines, by a database of coverage with contexts."""

from __future__ import annotations

import ast
import itertools
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from coverage import CoverageData
from mutant import Mutant


class Coverage:
    """The tests that run each line of the package.

    Args:
        database: The file that the tool coverage wrote, whose contexts are ids of tests.
        package: The folder of the package whose lines were recorded.
    """

    def __init__(self, database: Path, package: Path) -> None:
        self._data = CoverageData(str(database))
        self._data.read()
        self._package = package
        self._sizes = _sizes(database)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Returns the tests that run a fault's lines, or else its file, as where the lines run at import alone."""
        file = self._package / mutant.file
        source = file.read_text(encoding="utf-8")
        by_line = self._data.contexts_by_lineno(str(file))
        wanted = _with_statements(source, mutant.lines_in(source))
        found = _tests(itertools.chain(*(by_line.get(line, ()) for line in wanted)))
        found = found or _tests(itertools.chain(*by_line.values()))
        return sorted(found, key=lambda test: (self._sizes.get(test, 0), test))


def spread(tests: Iterable[str], most: int) -> list[str]:
    """Returns the first tests of each function in turn, and of these the first of each file.

    Args:
        tests: Ids of tests, the best first.
        most: How many are returned at most.
    """
    of_functions: defaultdict[str, int] = defaultdict(int)
    of_files: defaultdict[tuple[str, int], int] = defaultdict(int)
    places: dict[str, tuple[int, int]] = {}
    for test in tests:
        function, file = test.partition("[")[0], test.partition("::")[0]
        turn = of_functions[function]
        places[test] = turn, of_files[file, turn]
        of_functions[function] += 1
        of_files[file, turn] += 1
    return sorted(places, key=places.__getitem__)[:most]


def among(tests: Iterable[str], chosen: Collection[str]) -> list[str]:
    """Returns those of the tests that are among the chosen ones, in their order."""
    return [test for test in tests if test in chosen]


def _tests(contexts: Iterable[str]) -> set[str]:
    # a context is the id of a test, with |setup, |run or |teardown
    return {context.rpartition("|")[0] or context for context in contexts if "::" in context}


def _sizes(database: Path) -> Mapping[str, int]:
    """Returns how much each test runs: a test that runs little is cheap, and says more of a fault that it sees."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        found: defaultdict[str, int] = defaultdict(int)
        for table in ("arc", "line_bits"):
            rows = connection.execute(
                f"SELECT context, number FROM context JOIN "
                f"(SELECT context_id, COUNT(*) AS number FROM {table} GROUP BY context_id) ON context_id = context.id"
            )
            for context, number in rows:
                found[context.rpartition("|")[0]] += number
    return found


def _with_statements(source: str, lines: range) -> set[int]:
    """Returns lines with all lines of their statements, since coverage may have recorded another line of these."""
    found = set(lines)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            own = range(node.lineno, max(node.lineno, end) + 1)
            if not found.isdisjoint(own) and not set(lines).isdisjoint(own):
                found |= {*own}
    return found
