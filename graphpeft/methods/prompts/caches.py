"""The caches of Transformers models, in which a prompt or a prefix stays while text is generated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from graphpeft.graph.recorded import recorded

CACHES = ("cache", "past_key_values")
"""The names of the cache among the arguments of Transformers models, the newer ones first."""


def other_cache_names(arguments: Collection[str]) -> tuple[str, ...]:
    """Returns the names by which a forward takes its cache as a keyword, beside the one in its signature."""
    return CACHES[1:] if CACHES[0] in arguments and set(CACHES[1:]).isdisjoint(arguments) else ()


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """Returns the cache among the arguments of a forward; None if there is none."""
    given = [inputs[name] for name in CACHES if name in inputs]
    return first_not_none(*given) if len(given) > 1 else next(iter(given), None)


def under_one_name(cache: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns new values of the arguments for a cache: the first of them gets it, the others get None."""
    first, *others = (name for name in CACHES if name in inputs)
    return {first: cache} | {name: absent(inputs[name]) for name in others}


@recorded
def absent(value: object) -> None:
    """Returns None, in the place of an input that another one replaces."""


@recorded
def first_not_none(*values: Any) -> Any:
    """Returns the first of `values` that isn't None, or None."""
    return next((value for value in values if value is not None), None)


def has_tokens(cache: Any) -> bool:
    """Returns whether a cache holds tokens; the prompt's come first."""
    if cache is None:
        return False
    return len(cache) > 0 if isinstance(cache, tuple | list) else cache.get_seq_length() > 0


def length_with(cache: Any, embeddings: Tensor, unknown: int) -> int:
    """Returns the number of tokens in the input, (batch, length, …), and in a cache; `unknown` if it doesn't tell."""
    if not has_tokens(cache) or not hasattr(cache, "get_seq_length"):
        return unknown
    return cache.get_seq_length() + embeddings.shape[1]
