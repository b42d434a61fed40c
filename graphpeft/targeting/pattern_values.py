"""Values of options by patterns for names: `rank_pattern`, `alpha_pattern` and those like them.

The rules match PEFT 0.21.2, so that a config gives the same modules the same values there and here.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from graphpeft.targeting.endings import Endings
from graphpeft.targeting.patterns import Pattern

T = TypeVar("T")


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    r"""Returns a module's value in `rank_pattern` or `alpha_pattern`.

    A key is a regular expression for the end of a name, cut at a dot: `(.*\.)?(key)$`. A key that starts with `^` can
    thus only match a whole name. The first key that matches wins, in the order of the mapping.

    Args:
        patterns: Values by key.
        name: The dotted path of a module.
        default: The value where no key matches.

    Returns:
        The value of the first key that matches, or of the key that is spelled like the name, or the default.

    Raises:
        ValueError: A key is not a regular expression.
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

    Args:
        patterns: Values by key.
        name: The dotted path of a module.
        default: The value where no key matches.
        option: The name of the option, for errors.

    Returns:
        The value of the first key that matches, or of the key that is spelled like the name, or the default.

    Raises:
        ValueError: A key is not a regular expression.
    """
    for key, value in patterns.items():
        if Pattern(rf".*\.{key}$", key, option).match(name):
            return value
    return patterns.get(name, default)


def pattern_of(name: str) -> str:
    """Returns the key of `rank_pattern` or `alpha_pattern` that matches this name and no other."""
    return f"^{re.escape(name)}$"


def exact_patterns(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Returns patterns that each match one name alone, for the names whose value isn't the default.

    Args:
        values: The values by name.
        default: The value of names that no pattern matches.
    """
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
