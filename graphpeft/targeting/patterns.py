"""Regular expressions from users and files, with a limit on the time of matching.

A pattern such as ``(a|aa)+b`` can take Python's `re` years on a name of 60 letters, and any downloaded file may have
one. The `regex` package reads the same syntax and has timeouts. A pattern that `re` refuses, or that the two read
differently, is refused, so that a pattern has its meaning in PEFT.

Google's RE2 needs no limit, and lacks lookahead, which configs use.
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
"""The time that matching may take beyond the usual time."""

_USUAL = 2e-5
_USUAL_A_CHARACTER = 2e-9
"""The usual time per name, and per character of the pattern: about five times that of patterns without nested
repetitions."""

_LONGEST = 2**18
"""The most characters of a pattern; one that spells out the names of 5,000 layers has fewer."""

_COUNT = re.compile(r"\{(\d+),?(\d*)\}|\{,(\d+)\}")
"""A repetition count: ``{2}``, ``{2,}``, ``{2,9}`` or ``{,9}``."""

_MOST_STATES = 200_000
"""The most states of a compiled pattern, which has one for each repetition: some 60 MB."""

_READ_DIFFERENTLY = re.compile(r"(?<!\\)(\{(?!\d*,?\d*\})|\[:)")
"""Syntax that `regex` reads differently from `re`: ``x{e<=1}``, ``[[:alpha:]]``."""


class PatternError(ValueError):
    """A regular expression that can't be used."""


class Pattern:
    """A regular expression with a time limit; its methods are named as in `re`."""

    __slots__ = ("_compiled", "_entry", "_option", "_usual")

    def __init__(self, pattern: str, entry: str, option: str) -> None:
        self._entry, self._option = entry, option
        if len(pattern) > _LONGEST:
            raise PatternError(f"{shown(entry)} in {option} has {len(entry)} characters; {_LONGEST} are read at most")
        unlike = _READ_DIFFERENTLY.search(pattern)
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
        # the time of this thread, so that a busy machine makes no pattern slow
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
    """Returns an upper bound of the number of states, as if all repetitions were nested."""
    most = (max(float(count or 1) for count in found.groups()) for found in _COUNT.finditer(pattern))
    return len(pattern) * math.prod(max(count, 1) for count in most)


class _Time:
    """The time of all patterns together beyond the usual time, since many patterns may each be a little slow."""

    def __init__(self) -> None:
        self._beyond = 0.0

    def is_over(self, seconds: float) -> bool:
        """Adds time (negative for a fast match), and returns whether the sum is too large, which resets the sum."""
        self._beyond = max(0.0, self._beyond + seconds)
        if self._beyond <= _SECONDS:
            return False
        self._beyond = 0.0
        return True


_TIME = _Time()
