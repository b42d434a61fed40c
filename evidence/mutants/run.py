"""Plants each fault of mutants.json in a copy of the package, and notes the first test of each tier that fails.

A fault is first shown to the tests of the tier `make test`, and only if all pass to those that `make test-all` has
beside them. Which tests are run, one of

python evidence/mutants/run.py --coverage FILE            those that run the fault's lines, by a database of coverage
python evidence/mutants/run.py --candidates ARGUMENTS     those that pytest finds by these arguments
python evidence/mutants/run.py --again                    those of the functions that killed the fault before

A test that also fails without the fault doesn't count.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from choosing import Coverage, among, spread
from mutant import SURVIVES, TIER, WHOLE, Mutant, mutants, write
from tqdm import tqdm
from tree import ROOT, TestsError, Tree

OTHERS = "not long and not compiled and not integrations and not browser"
MOST = 150  # tests of a tier that a fault is shown to
MINUTES = 15  # that these may take

Chosen = Callable[[Mutant, str], Sequence[str]]
"""Returns the arguments of pytest that name the tests for a fault in a tier."""


def main(arguments: argparse.Namespace) -> str | None:
    """Runs the tests for all faults that are wanted, and writes the list after each.

    Returns:
        What went wrong: the faults that survive, or that could not be judged.
    """
    everything = mutants()
    wanted = [each for each in everything if _is_wanted(each, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Tree] = SimpleQueue()
        for number in range(arguments.processes):
            (place := Path(folder) / str(number)).mkdir()
            trees.put(Tree(place))
        runs = Runs(trees, _chosen(arguments, wanted, trees), arguments.tier, arguments.whole)
        lock, failures = threading.Lock(), list[str]()

        def judge(mutant: Mutant) -> None:
            try:
                found = runs.killers(mutant)
            except TestsError as error:  # the other faults can be judged nevertheless
                failures.append(f"{mutant.name}: {error}")
                return
            with lock:
                mutant.killed_by = found
                write(everything)
                tqdm.write(f"{mutant.name}: {found[TIER] if found[TIER] != SURVIVES else found}")
                if found[WHOLE] == SURVIVES:
                    failures.append(f"{mutant.name}: no test fails")

        with ThreadPoolExecutor(arguments.processes) as pool:
            list(tqdm(pool.map(judge, wanted), total=len(wanted), unit="fault"))
    return "\n".join(failures) or None


class Runs:
    """Runs of tests on faulty copies of the package.

    Args:
        trees: The copies that no thread uses now.
        chosen: Chooses the tests.
        tier: The expression of markers that selects the tier.
        whole: The one that selects all tests.
    """

    def __init__(self, trees: SimpleQueue[Tree], chosen: Chosen, tier: str, whole: str) -> None:
        self._trees, self._chosen = trees, chosen
        self._expressions = {TIER: f"({tier}) and {OTHERS}", WHOLE: f"({whole}) and not ({tier}) and {OTHERS}"}
        self._passing: dict[str, bool] = {}

    def killers(self, mutant: Mutant) -> dict[str, str]:
        """Returns the first test of each tier that a fault lets fail, or `SURVIVES`."""
        tree = self._trees.get()
        try:
            in_tier = self._killer(tree, mutant, TIER)
            in_whole = in_tier or self._killer(tree, mutant, WHOLE)
        finally:
            self._trees.put(tree)
        return {TIER: in_tier or SURVIVES, WHOLE: in_whole or SURVIVES}

    def _killer(self, tree: Tree, mutant: Mutant, tier: str) -> str | None:
        tests = [*self._chosen(mutant, tier)]
        # of tests that are named one by one, as those by coverage, a sample would leave some out
        expression = "" if any("[" in test for test in tests) else self._expressions[tier]
        while tests:
            with tree.faulty(mutant):
                failed = tree.first_failure(tests, expression, 60 * MINUTES)
            if failed is None or self._passes(tree, failed):
                return failed
            tests += ["--deselect", failed]
        return None

    def _passes(self, tree: Tree, test: str) -> bool:
        """Returns whether a test passes without any fault."""
        if test not in self._passing:
            self._passing[test] = tree.first_failure([test], "", 60 * MINUTES) is None
        return self._passing[test]


def _is_wanted(mutant: Mutant, arguments: argparse.Namespace) -> bool:
    if arguments.unknown and mutant.killed_by.get(WHOLE, SURVIVES) != SURVIVES:
        return False
    return not arguments.only or any(words in mutant.name for words in arguments.only)


def _chosen(arguments: argparse.Namespace, wanted: Sequence[Mutant], trees: SimpleQueue[Tree]) -> Chosen:
    """Returns the function that chooses tests as the command line asks for it."""
    if arguments.again:
        return lambda mutant, _: sorted({test.partition("[")[0] for test in mutant.killed_by.values()} - {SURVIVES})
    if arguments.candidates:
        given = shlex.split(arguments.candidates)
        return lambda *_: given
    coverage = Coverage(arguments.coverage, arguments.package)
    # in one thread, since several that parse at a time make Python 3.11 fail
    seeing = {mutant.name: coverage.tests_of(mutant) for mutant in wanted}
    tree = trees.get()
    in_tier = {*tree.collected(f"({arguments.tier}) and {OTHERS}")}
    beside = {*tree.collected(f"({arguments.whole}) and {OTHERS}")} - in_tier
    trees.put(tree)

    def chosen(mutant: Mutant, tier: str) -> list[str]:
        return spread(among(seeing[mutant.name], in_tier if tier == TIER else beside), MOST)

    return chosen


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--coverage", type=Path, metavar="FILE", help="the database of coverage")
    which.add_argument("--again", action="store_true", help="the functions that killed each fault before")
    which.add_argument("--candidates", metavar="ARGUMENTS", help='arguments of pytest, as "tests/test_dora.py -k norm"')
    parser.add_argument(
        "--package", type=Path, default=ROOT / "graphpeft", help="the folder of the package that it is of"
    )
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="only faults whose name has one of these texts")
    parser.add_argument("--unknown", action="store_true", help="only faults that no test is known to kill")
    parser.add_argument("--processes", type=int, default=1, help="how many faults are planted at a time")
    parser.add_argument("--tier", default="not full", help="the markers of `make test`")
    parser.add_argument("--whole", default="not long", help="the markers of `make test-all`")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(_arguments()))
