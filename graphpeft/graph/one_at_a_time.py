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
from torch import nn

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


def run_alone(exchanged: Iterable[str], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward of a graph that runs the module's own forward on other tensors, alone.

    From its first node on, since a graph would read the tensors that another thread has put there.

    Args:
        exchanged: The paths of the tensors for which there are others.
        forward: The compiled code of the graph.
    """
    owners = frozenset(path.rpartition(".")[0] for path in exchanged)

    @functools.wraps(forward)
    def alone(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with alone_with(self, owners):
            return forward(self, *args, **kwargs)

    return alone
