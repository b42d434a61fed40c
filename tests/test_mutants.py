"""The planted faults of evidence/mutants/: each can still be planted, and `make test` kills almost all that can be."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from typing import Any

import tiers

ROOT = Path(__file__).parents[1]
MUTANTS: list[dict[str, Any]] = json.loads((ROOT / "evidence/mutants/mutants.json").read_text(encoding="utf-8"))
ROOMS = {path.name for path in (ROOT / "graphpeft").iterdir() if path.is_dir() and path.name != "__pycache__"}

TIER, WHOLE, SURVIVES = "test", "test-all", "survives"


def killed(by: str) -> list[dict[str, Any]]:
    """Returns the faults that a test of a tier kills."""
    return [mutant for mutant in MUTANTS if mutant["killed_by"].get(by, SURVIVES) != SURVIVES]


def is_in_tier(mutant: dict[str, Any]) -> bool:
    """Returns whether the test that kills a fault in the tier is in the tier now, of the files that were collected."""
    test = mutant["killed_by"][TIER]
    files = {nodeid.partition("::")[0] for nodeid in tiers.COLLECTED}
    return test != SURVIVES and (test.partition("::")[0] not in files or tiers.COLLECTED.get(test, False))


@functools.cache
def functions_in(file: str) -> frozenset[str]:
    """Returns the names of a file's functions, also of those in classes, as ids of tests have them."""
    found: set[str] = set()
    waiting: list[tuple[ast.AST, str]] = [(ast.parse((ROOT / file).read_text(encoding="utf-8")), "")]
    while waiting:
        around, prefix = waiting.pop()
        for node in ast.iter_child_nodes(around):
            if isinstance(node, ast.ClassDef):
                waiting.append((node, f"{prefix}{node.name}::"))
            elif isinstance(node, ast.FunctionDef):
                found.add(prefix + node.name)
    return frozenset(found)


def is_there(test: str) -> bool:
    """Returns whether a test's function is in its file."""
    file, _, name = test.partition("[")[0].partition("::")
    return (ROOT / file).exists() and name in functions_in(file)


def test_each_fault_is_another():
    assert len({mutant["name"] for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant["file"], mutant["before"], mutant["after"]) for mutant in MUTANTS}) == len(MUTANTS)


def test_each_fault_can_be_planted():
    for mutant in MUTANTS:
        source = (ROOT / "graphpeft" / mutant["file"]).read_text(encoding="utf-8")
        assert source.count(mutant["before"]) == 1, mutant["name"]
        compile(source.replace(mutant["before"], mutant["after"]), mutant["file"], "exec")


def test_faults_are_in_all_rooms():
    assert {mutant["file"].partition("/")[0] for mutant in MUTANTS if "/" in mutant["file"]} == ROOMS


def test_the_tests_that_kill_faults_are_there():
    named = {test for mutant in MUTANTS for test in mutant["killed_by"].values() if test != SURVIVES}
    assert [test for test in sorted(named) if not is_there(test)] == []


def test_each_of_at_least_sixty_faults_is_killed():
    assert len(killed(WHOLE)) == len(MUTANTS) >= 60


def test_the_tier_kills_almost_all_faults_that_any_test_kills():
    missed = [mutant["name"] for mutant in killed(WHOLE) if not is_in_tier(mutant)]
    assert len(missed) <= 0.05 * len(killed(WHOLE)), missed
