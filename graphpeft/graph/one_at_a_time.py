"""Modules whose tensors are exchanged while their own forward runs: one thread at a time runs it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LOCKS.clear)


@contextlib.contextmanager
def alone_with(module: nn.Module, owners: Iterable[str]) -> Iterator[None]:
    """Lets other threads wait that exchange tensors of modules inside of `module`, by path."""
    with contextlib.ExitStack() as stack:
        # in one order, so that no two threads wait for each other
        for owner in sorted(map(module.get_submodule, owners), key=id):
            stack.enter_context(_LOCKS.setdefault(owner, threading.RLock()))
        yield


def run_alone(graph: fx.Graph, own_forward: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward of a graph, alone if that runs the module's own forward on other tensors.

    From its first node on, since a graph would read those that another thread has put there.

    Args:
        graph: The graph.
        own_forward: The attribute by which graphs call the own forward.
        forward: Its compiled code.
    """
    calls = [user for node in graph.nodes if node.target == own_forward for user in node.users]
    exchanged = [path for user in calls for given in user.args if isinstance(given, dict) for path in given]
    owners = frozenset(path.rpartition(".")[0] for path in exchanged if isinstance(path, str))
    if not owners:
        return forward

    @functools.wraps(forward)
    def alone(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with alone_with(self, owners):
            return forward(self, *args, **kwargs)

    return alone
