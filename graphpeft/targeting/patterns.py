"""Regular expressions that somebody has written, with a limit for the time that they may take.

A pattern such as ``(a|aa)+b`` can take Python's `re` years on a name of 60 letters, and stand in a file of anybody. The
`regex` package reads the same syntax and can stop. What `re` refuses is refused, and what the two read differently, so
that a pattern means here what it means in PEFT.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import regex

from graphpeft.wording import shown

_SECONDS = 0.25
"""How long matching may take, beside what is usual for so many names."""

_USUAL = 2e-5
_USUAL_A_CHARACTER = 2e-9
"""What is usual for a name, and for each character of the pattern: about five times what patterns take without nested
repetitions."""

_LONGEST = 2**18
"""Characters of a pattern; one that spells out the names of 5,000 layers has fewer."""

_COUNT = re.compile(r"\{(\d+),?(\d*)\}|\{,(\d+)\}")
"""How often something is repeated: ``{2}``, ``{2,}``, ``{2,9}`` or ``{,9}``."""

_MOST_STATES = 200_000
"""Into how many states a pattern may be compiled, which has one for each repetition: some 60 MB."""

_READ_OTHERWISE = re.compile(r"(?<!\\)(\{(?!\d*,?\d*\})|\[:)")
"""What `regex` takes for something else than `re` does: ``x{e<=1}``, ``[[:alpha:]]``."""


class PatternError(ValueError):
    """A regular expression that can't be used."""


class Pattern:
    """A regular expression that stops; its methods are those of `re`.

    Args:
        pattern: The expression.
        entry: What somebody has written of it.
        option: The option where it was written.

    Raises:
        PatternError: It is no regular expression. Its methods raise it for one that takes too long.
    """

    __slots__ = ("_compiled", "_entry", "_option", "_usual")

    def __init__(self, pattern: str, entry: str, option: str) -> None:
        self._entry, self._option = entry, option
        if len(pattern) > _LONGEST:
            raise PatternError(f"{shown(entry)} in {option} has {len(entry)} characters; {_LONGEST} are read at most")
        unlike = _READ_OTHERWISE.search(pattern)
        if unlike is not None:
            raise PatternError(f"{shown(entry)} in {option} has {unlike[0]!r}; write it as re.escape does")
        if _states(pattern) > _MOST_STATES:
            raise PatternError(
                f"{shown(entry)} in {option} repeats a part too often to be compiled; write * or + in place of numbers "
                "such as {1000}"
            )
        try:
            re.compile(pattern)
            self._compiled = regex.compile(pattern, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise PatternError(
                f"{shown(entry)} in {option} is not a regular expression: {error}. Write special characters as "
                "re.escape does."
            ) from error
        self._usual = _USUAL + _USUAL_A_CHARACTER * len(pattern)

    def match(self, name: str) -> Any:
        """Returns the match of the beginning of a name, or None."""
        return self._timed(self._compiled.match, name)

    def fullmatch(self, name: str) -> Any:
        """Returns the match of a whole name, or None."""
        return self._timed(self._compiled.fullmatch, name)

    def search(self, name: str) -> Any:
        """Returns the first match anywhere in a name, or None."""
        return self._timed(self._compiled.search, name)

    def sub(self, replacement: str, name: str) -> str:
        """Returns a name with all matches replaced."""
        return self._timed(self._compiled.sub, replacement, name)

    def _timed(self, method: Callable[..., Any], *arguments: str) -> Any:
        # of this thread alone: a machine that is busy with other things makes no pattern slow
        began = time.thread_time()
        try:
            found = method(*arguments, timeout=_SECONDS)
        except TimeoutError as error:
            raise self._too_slow() from error
        if _TIME.is_over(time.thread_time() - began - self._usual):
            raise self._too_slow()
        return found

    def _too_slow(self) -> PatternError:
        return PatternError(
            f"{shown(self._entry)} in {self._option} takes too long to match the model's names; write it without "
            "repetitions inside repetitions"
        )


def _states(pattern: str) -> float:
    """Returns a bound of the number of states, as if all repetitions were inside of each other."""
    most = (max(float(count or 1) for count in found.groups()) for found in _COUNT.finditer(pattern))
    return len(pattern) * math.prod(max(count, 1) for count in most)


class _Time:
    """The time that all patterns together have taken beyond what is usual: many can be slow, each a little."""

    def __init__(self) -> None:
        self._beyond = 0.0

    def is_over(self, seconds: float) -> bool:
        """Adds time, which is negative for a fast match, and tells whether it is too much; then it begins anew."""
        self._beyond = max(0.0, self._beyond + seconds)
        if self._beyond <= _SECONDS:
            return False
        self._beyond = 0.0
        return True


_TIME = _Time()
