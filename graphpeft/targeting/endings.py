"""Finds the first of many patterns that matches the end of a name, as for `rank_pattern`.

A file may have one pattern for each site of a model. Patterns that spell out a name are looked up in a dict; the others
are tried in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from graphpeft.targeting.patterns import Pattern

_SPECIAL = frozenset("[](){}*+?|^$\\")


class _Spelled(NamedTuple):
    """A pattern that spells out a name, where an unescaped dot is any character.

    Attributes:
        text: The name, with "." for each such dot.
        dots: The places of these dots in `text`.
        is_whole: Whether the pattern matches only whole names, not their ends.
    """

    text: str
    dots: tuple[int, ...]
    is_whole: bool


class Endings:
    r"""Patterns for the ends of names, each cut at a dot: ``(.*\.)?(key)$``.

    Args:
        keys: The patterns.
        option: The config option with the patterns.

    Raises:
        PatternError: A key is no regular expression.
    """

    def __init__(self, keys: tuple[str, ...], option: str) -> None:
        self._patterns: dict[int, Pattern] = {}
        self._spelled: dict[_Spelled, int] = {}
        self._dots: dict[int, set[tuple[int, ...]]] = {}
        for place, key in enumerate(keys):
            spelled = _spelled(key)
            if spelled is None:
                self._patterns[place] = Pattern(rf"(.*\.)?({key})$", key, option)
            else:
                self._spelled.setdefault(spelled, place)
                self._dots.setdefault(len(spelled.text), set()).add(spelled.dots)

    def first(self, name: str) -> int | None:
        """Returns the index of the first pattern that matches a name, or None."""
        spelled = min(self._places(name), default=None)
        for place, pattern in self._patterns.items():
            if spelled is not None and place > spelled:
                break
            if pattern.match(name) is not None:
                return place
        return spelled

    def _places(self, name: str) -> Iterator[int]:
        start = 0
        while start >= 0:
            end = name[start:]
            for dots in self._dots.get(len(end), ()):
                letters = list(end)
                for dot in dots:
                    letters[dot] = "."
                text = "".join(letters)
                for is_whole in (False, True) if start == 0 else (False,):
                    place = self._spelled.get(_Spelled(text, dots, is_whole))
                    if place is not None:
                        yield place
            start = name.find(".", start) + 1 or -1


def _spelled(key: str) -> _Spelled | None:
    """Returns the name that a pattern spells out, or None for any other pattern."""
    is_whole = key.startswith("^")
    rest = key.removeprefix("^").removesuffix("$")
    text, dots = [], []
    characters = iter(rest)
    for character in characters:
        if character == "\\":
            character = next(characters, "")
            if not character or character.isalnum():
                return None
        elif character == ".":
            dots.append(len(text))
        elif character in _SPECIAL:
            return None
        text.append(character)
    return _Spelled("".join(text), tuple(dots), is_whole) if text else None
