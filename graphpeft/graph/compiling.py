"""Compiles the source of a graph; `linecache` has it for tracebacks and `inspect` while its owner lives."""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable, Mapping
from typing import Any

_NUMBERS = itertools.count()


def compiled(owner: object, source: str, variables: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the function ``forward`` that the source defines.

    Args:
        owner: The object whose end removes the source from `linecache`.
        source: The source.
        variables: The globals that the source names.
    """
    # fx would keep the source forever; its error handling knows generated code by this file name
    file = f"<eval_with_key>.graphpeft.{next(_NUMBERS)}"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    weakref.finalize(owner, linecache.cache.pop, file, None).atexit = False
    namespace = dict(variables)
    # the __future__ imports of this file must not apply to the source
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    return namespace.pop("forward")
