"""Compiles the source of a graph; `linecache` has it for tracebacks and `inspect` while its owner lives."""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx as fx

_NUMBERS = itertools.count()


def compiled(owner: object, graph: fx.Graph, source: str, variables: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the function ``forward`` that the source defines."""
    # fx would keep the source forever; its error handling knows generated code by this file name
    file = f"<eval_with_key>.graphpeft.{next(_NUMBERS)}"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    weakref.finalize(owner, linecache.cache.pop, file, None).atexit = False
    namespace = dict(variables)
    # the __future__ imports of this file must not apply to the source
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    return _with_own_defaults(namespace.pop("forward"), graph)


def _with_own_defaults(forward: Any, graph: fx.Graph) -> Callable[..., Any]:
    """Gives a compiled forward the very objects that are the defaults of its graph's placeholders.

    A number in source is another object, and models may ask whether an argument *is* its default.
    """
    own = {str(node.target): node.args[0] for node in graph.nodes if node.op == "placeholder" and node.args}
    positional = forward.__code__.co_varnames[: forward.__code__.co_argcount]
    forward.__defaults__ = tuple(own[name] for name in positional if name in own) or None
    forward.__kwdefaults__ = {name: own[name] for name in forward.__kwdefaults__ or {}} or None
    return forward
