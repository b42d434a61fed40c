"""What a checkpointed function takes along when it runs again in the backward.

PyTorch keeps the state of generators and of autocast for it, but nothing of ours: the call in which it ran is over by
then, and another may have begun. So what holds for the time of a call is entered again around the function. PyTorch has
no public way to do so for checkpoints in others' code; therefore, its two ways to checkpoint are exchanged, for the
time of such a call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch

from graphpeft._torch import CHECKPOINT_GENERATOR, CheckpointFunction, checkpoint_module
from graphpeft.transaction import at_end_of

Factory = Callable[[], AbstractContextManager[Any]]

Function = Callable[..., Any]

_PRESENT: ContextVar[tuple[Factory, ...]] = ContextVar("graphpeft_taken_along", default=())
"""What holds just now, the outermost first."""


@contextlib.contextmanager
def taken_along(factory: Factory) -> Iterator[None]:
    """Enters what `factory` makes, and lets functions that are checkpointed inside enter it again when they run again.

    Args:
        factory: Makes a context, each time anew.
    """
    if torch.compiler.is_compiling():
        # a compiler follows checkpoints by itself, and can't follow a context variable that is set
        with factory():
            yield
        return
    with _present((*_PRESENT.get(), factory)), factory():
        yield


@contextlib.contextmanager
def _present(factories: tuple[Factory, ...]) -> Iterator[None]:
    """Lets functions that are checkpointed within the context take along what `factories` make."""
    with checkpoints_bound_by(_bound), contextlib.ExitStack() as stack:
        # not by a token, which another context may have made: that of a generator's caller
        at_end_of(stack, _PRESENT.set, _PRESENT.get())
        _PRESENT.set(factories)
        yield


def _bound(function: Function) -> Function:
    factories = _PRESENT.get()
    if not factories:
        return function

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        if _PRESENT.get() is factories:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            # what is checkpointed inside takes them along, too
            stack.enter_context(_present(factories))
            for factory in factories:
                stack.enter_context(factory())
            return function(*args, **kwargs)

    return run


# checkpoints

Bind = Callable[[Function], Function]

_LOCK = threading.Lock()
_BINDS: list[tuple[object, Bind]] = []
"""What binds checkpointed functions just now, in any thread; an entry for each context."""

os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@contextlib.contextmanager
def checkpoints_bound_by(bind: Bind) -> Iterator[None]:
    """Lets each function that is checkpointed within the context be bound by `bind`.

    Args:
        bind: Returns what is checkpointed in place of a function. Since it is asked in other threads and tasks, too,
            it must know whether it concerns them.
    """
    entry = (object(), bind)
    with contextlib.ExitStack() as stack:
        at_end_of(stack, _leave, entry)
        with _LOCK:
            _BINDS.append(entry)
            if len(_BINDS) == 1:
                _exchange()
        yield


def _leave(entry: tuple[object, Bind]) -> None:
    with _LOCK:
        if entry in _BINDS:
            _BINDS.remove(entry)
        if not _BINDS:
            _put_back()


def _exchange() -> None:
    for owner, name, binding in (
        (checkpoint_module, CHECKPOINT_GENERATOR, _binding_generator),
        (CheckpointFunction, "apply", _binding_apply),
    ):
        before = owner.__dict__.get(name)
        if name not in _BINDINGS or _BINDINGS[name][0] is not before:
            # the same object again, since compiled code asks whether it is
            _BINDINGS[name] = before, binding(before)
        new = _BINDINGS[name][1]
        _EXCHANGED.append((owner, name, new, before))
        setattr(owner, name, new)


def _binding_generator(run_again: Any) -> Function:
    @functools.wraps(run_again)
    def generator(function: Function, *args: Any, **kwargs: Any) -> Any:
        return run_again(_bound_by_all(function), *args, **kwargs)

    return generator


def _binding_apply(own: Any) -> Any:
    def apply(cls: Any, function: Function, *args: Any) -> Any:
        run_again = vars(torch.autograd.Function)["apply"] if own is None else own
        return run_again.__get__(None, cls)(_bound_by_all(function), *args)

    return classmethod(apply)


_BINDINGS: dict[str, tuple[Any, Any]] = {}
"""What was bound last by each name, and what it became."""

_EXCHANGED: list[tuple[Any, str, Any, Any]] = []
"""What was exchanged: in which object, by which name, the new value and that of before."""


def _put_back() -> None:
    while _EXCHANGED:
        owner, name, new, before = _EXCHANGED[-1]
        # another's exchange, made since, stays; it puts back ours, which does nothing then
        if vars(owner).get(name) is new:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        _EXCHANGED.pop()


def _bound_by_all(function: Function) -> Function:
    for bind in dict.fromkeys(bind for _, bind in tuple(_BINDS)):
        function = bind(function)
    return function
