"""What a checkpointed function takes along when it runs again in the backward.

PyTorch keeps the state of generators and of autocast for it, but nothing of ours: the call in which it ran is over by
then, and another may have begun. So what holds for the time of a call is entered again around the function.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.utils.checkpoint

from graphpeft._torch import CHECKPOINT_GENERATOR

Factory = Callable[[], AbstractContextManager[Any]]


class _Present(threading.local):
    """What holds in a thread just now, the outermost first."""

    factories: tuple[Factory, ...] = ()


_PRESENT = _Present()


@contextlib.contextmanager
def taken_along(factory: Factory) -> Iterator[None]:
    """Enters what `factory` makes, and lets functions that are checkpointed inside enter it again when they run again.

    Args:
        factory: Makes a context, each time anew.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _wrap_checkpoints()
    before = _PRESENT.factories
    _PRESENT.factories = (*before, factory)
    try:
        with factory():
            yield
    finally:
        _PRESENT.factories = before


def _wrap_checkpoints() -> None:
    """Lets both of PyTorch's ways to checkpoint bind the functions that they are given, once and for all."""
    checkpoint: Any = torch.utils.checkpoint
    if getattr(checkpoint, "_graphpeft_takes_along", False):
        return
    run_again, reentrant = getattr(checkpoint, CHECKPOINT_GENERATOR), checkpoint.CheckpointFunction

    @functools.wraps(run_again)
    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run_again(_bound(function), *args, **kwargs)

    class Reentrant(reentrant):
        @classmethod
        def apply(cls, function: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(_bound(function), *args)

    setattr(checkpoint, CHECKPOINT_GENERATOR, generator)
    checkpoint.CheckpointFunction = Reentrant
    checkpoint._graphpeft_takes_along = True


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    factories = _PRESENT.factories
    if not factories:
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for factory in factories:
                stack.enter_context(factory())
            return function(*args, **kwargs)

    return run
