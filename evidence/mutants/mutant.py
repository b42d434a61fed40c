"""The planted faults in mutants.json: how they are read, written and applied."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

LIST = Path(__file__).parent / "mutants.json"

TIER, WHOLE = "test", "test-all"
"""The two tiers of tests; the first is a sample of the second."""

SURVIVES = "survives"
"""Stands in place of a test where no test of a tier fails."""


@dataclass
class Mutant:
    """A planted fault.

    Attributes:
        name: A sentence that says what is wrong.
        file: The path of the faulty file in the package.
        before: The text that is replaced. It occurs once in the file.
        after: The text that replaces it.
        killed_by: The first test of each tier that fails, or `SURVIVES`; empty before the first run.
    """

    name: str
    file: str
    before: str
    after: str
    killed_by: dict[str, str] = field(default_factory=dict)

    def applied_to(self, source: str) -> str:
        """Returns the source of the file with the fault.

        Raises:
            ValueError: If the text to replace doesn't occur exactly once.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(f"{self.name}: the text to replace occurs {count} times in {self.file}")
        return source.replace(self.before, self.after)

    def lines_in(self, source: str) -> range:
        """Returns the numbers of the lines of a source that the fault changes."""
        start = source.index(self.before)
        first = source.count("\n", 0, start) + 1
        return range(first, first + self.before.rstrip("\n").count("\n") + 1)


def mutants() -> list[Mutant]:
    """Returns all planted faults."""
    return [Mutant(**each) for each in json.loads(LIST.read_text(encoding="utf-8"))]


def write(all_mutants: list[Mutant]) -> None:
    """Writes the list, with the tests that kill each fault."""
    plain = [dataclasses.asdict(each) for each in all_mutants]
    LIST.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
