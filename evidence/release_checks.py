"""Runs what a release needs and no single change, one after the other, and writes build/release_checks.md.

python evidence/release_checks.py                   all of it
python evidence/release_checks.py long third-party  some of it
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "build" / "release_checks.md"

CHECKS: dict[str, tuple[str, ...]] = {
    # first, while all changes are committed: others write pages
    "benchmarks": ("bench", "ARGS=--write"),
    "long": ("test-all", "ARGS=-m long"),
    "compiled": ("test-all", "ARGS=-m compiled"),
    "floors": ("floors", "PYTHON=python3.10", "SAMPLE="),
    "newest": ("newest", "SAMPLE="),
    "tiers": ("tiers",),
    "faults": ("faults",),
    "third-party": ("third-party",),
    "peft-tests": ("peft-tests",),
}
"""The arguments of make by the name of the check. Without a sample, an environment of its own runs all tests."""


class Outcome(NamedTuple):
    """How a check ended.

    Attributes:
        status: The exit status of make.
        minutes: The minutes that it took.
        said: The last line of its output.
    """

    status: int
    minutes: float
    said: str


def main(wanted: list[str]) -> None:
    """Runs these checks, or all, writes the page after each, and fails if one has failed."""
    outcomes: dict[str, Outcome] = {}
    for name in tqdm(wanted or list(CHECKS), unit="check"):
        outcomes[name] = _outcome(name)
        PAGE.write_text(page(outcomes), encoding="utf-8")
        tqdm.write(_line(name, outcomes[name]))
    sys.exit(any(outcome.status for outcome in outcomes.values()))


def _outcome(name: str) -> Outcome:
    log = ROOT / "build" / "release" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(["make", *CHECKS[name]], cwd=ROOT, stdout=output, stderr=output, check=False).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not line.startswith("make")]
    return Outcome(status, (time.monotonic() - start) / 60, said[-1] if said else "")


def page(outcomes: dict[str, Outcome]) -> str:
    """Returns the page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = "".join(_line(name, outcome) + "\n" for name, outcome in outcomes.items())
    head = "| check | exit status | minutes | the last line of its log in build/release/ |\n|---|--:|--:|---|\n"
    return f"# Release checks at {commit.stdout.strip()}\n\n{head}{lines}"


def _line(name: str, outcome: Outcome) -> str:
    said = outcome.said.replace("|", "\\|").strip("= ")
    return f"| {name} | {outcome.status} | {outcome.minutes:.0f} | {said} |"


def _parse() -> list[str]:
    """Returns the names of the checks on the command line."""
    parser = argparse.ArgumentParser(description="Runs what a release needs, and writes build/release_checks.md.")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=" | ".join(CHECKS))
    wanted = parser.parse_args().checks
    if unknown := sorted(set(wanted) - set(CHECKS)):
        parser.error(f"no checks are called {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    return wanted


if __name__ == "__main__":
    main(_parse())
