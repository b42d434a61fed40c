"""Compiles the source of a graph, and lets tools that read source find it for as long as its owner lives."""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable, Mapping
from typing import Any

_NUMBERS = itertools.count()


def compiled(owner: object, source: str, variables: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the function ``forward`` of a source.

    Args:
        owner: With it, the source is forgotten.
        source: The source.
        variables: The globals that it names.
    """
    # fx keeps the source of each graph for good; its errors tell generated code by such a name of a file
    file = f"<eval_with_key>.graphpeft.{next(_NUMBERS)}"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    weakref.finalize(owner, linecache.cache.pop, file, None).atexit = False
    namespace = dict(variables)
    # the imports that this file has from __future__ aren't for the source
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    return namespace.pop("forward")
