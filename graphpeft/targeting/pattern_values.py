"""Values of options by patterns for names: `rank_pattern`, `alpha_pattern` and those like them.

The rules match PEFT 0.21.2, so that a config gives the same modules the same values there and here.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from graphpeft.targeting.patterns import Pattern

T = TypeVar("T")


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    r"""Returns a module's value in `rank_pattern` or `alpha_pattern`.

    A key is a regular expression for the end of a name, cut at a dot: `(.*\.)?(key)$`. A key that starts with `^` can
    thus only match a whole name. The first key that matches wins, in the order of the mapping.
    """
    if not patterns:
        return default
    place = _endings(tuple(patterns)).first(name)
    if place is not None:
        return next(itertools.islice(patterns.values(), place, None))
    # a name may have characters that are special in regular expressions, so its plain spelling matches as well
    return patterns.get(name, default)


def value_below(patterns: Mapping[str, T], name: str, default: T, option: str) -> T:
    r"""Returns a module's value in `n_frequency_pattern` or `block_size_pattern`, which have another rule.

    A key is a regular expression for what is behind a dot of a name, `.*\.key$`, or a whole name as it is spelled.
    """
    for key, value in patterns.items():
        if Pattern(rf".*\.{key}$", key, option).match(name):
            return value
    return patterns.get(name, default)


def pattern_of(name: str) -> str:
    """Returns the key of `rank_pattern` or `alpha_pattern` that matches this name and no other."""
    return f"^{re.escape(name)}$"


def exact_patterns(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Returns patterns that each match one name alone, for the names whose value isn't the default."""
    return {pattern_of(name): value for name, value in values.items() if value != default}


def name_of(pattern: str) -> str | None:
    """Returns the name of which `pattern_of` makes this key, or None for another key."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:-1], flags=re.DOTALL)
    return name if pattern == pattern_of(name) else None


def fits_any(key: str, names: Iterable[str]) -> bool:
    """Returns whether a key of `rank_pattern` or `alpha_pattern` matches one of `names`, see `pattern_value`."""
    pattern = _endings((key,))
    return any(pattern.first(name) is not None or name == key for name in names)


# cached, since each site looks up the same keys
@functools.lru_cache(maxsize=16)
def _endings(keys: tuple[str, ...]) -> Endings:
    return Endings(keys, "rank_pattern or alpha_pattern")


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
    r"""Patterns for the ends of names, each cut at a dot: ``(.*\.)?(key)$``."""

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
