"""Checks laws, and returns the verdicts as a table."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.progress import steps
from graphpeft.testing.comparing import LawError
from graphpeft.wording import as_html, text_table

Outcome = Literal["holds", "fails", "doesn't apply"]


class Verdict(NamedTuple):
    """The result of checking one law.

    Attributes:
        law: The law.
        outcome: ``"holds"``, ``"fails"`` or ``"doesn't apply"``.
        why: Why it doesn't hold or apply, why only a part was checked, or a number that was found.
        seconds: The duration of the check.
    """

    law: str
    outcome: Outcome
    why: str
    seconds: float


@dataclass(frozen=True)
class Verification:
    """The results of checking all laws; it prints as a table.

    Attributes:
        subject: The model and the method, or the rewrite.
        verdicts: The verdict on each law.
    """

    subject: str
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool:
        """Whether no law fails."""
        return not self.failures

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """The laws that fail."""
        return tuple(verdict for verdict in self.verdicts if verdict.outcome == "fails")

    def __str__(self) -> str:
        rows = [
            (law, outcome, f"{seconds:.1f}", why.partition("\n")[0]) for law, outcome, why, seconds in self.verdicts
        ]
        lines = [self.subject, "", *text_table(("law", "outcome", "seconds", "why"), rows, ("seconds",))]
        for failure in self.failures:
            lines += ["", f"{failure.law}:", failure.why]
        return "\n".join(lines)

    __repr__ = __str__
    _repr_html_ = as_html


class Law(NamedTuple):
    """A law to check for one subject.

    Attributes:
        text: The law's number and a short form of it.
        check: Raises unless the law holds; returns a note for the table, such as why only a part applies, or None.
        silent: The reason why the law doesn't apply to the subject, or "".
    """

    text: str
    check: Callable[[], str | None]
    silent: str = ""


def verified(subject: str, laws: Sequence[Law], progress: bool, quiet: bool) -> Verification:
    """Checks laws one after the other, and returns and prints the verdicts in the order of the laws' numbers."""
    verdicts = []
    with steps(len(laws)) if progress else contextlib.nullcontext(_nothing) as step:
        for law in laws:
            step(law.text)
            start = time.perf_counter()
            outcome, why = ("doesn't apply", law.silent) if law.silent else _outcome(law)
            verdicts.append(Verdict(law.text, outcome, why, time.perf_counter() - start))
    found = Verification(subject, tuple(sorted(verdicts)))
    if not quiet:
        print(found)  # noqa: T201
    return found


def _nothing(_: str) -> None:
    pass


def _outcome(law: Law) -> tuple[Outcome, str]:
    try:
        with warnings.catch_warnings():
            # warnings about the model or the config were shown when it was adapted before
            warnings.simplefilter("ignore")
            note = law.check()
    except TraceError as error:
        return "doesn't apply", f"the model can't be traced: {error}"
    except GuardError as error:
        return "doesn't apply", f"a trace of the model refuses the call: {error}"
    except AdaptError as error:
        return "doesn't apply", f"it is refused: {error}"
    except LawError as error:
        return "fails", str(error)
    return "holds", note or ""
