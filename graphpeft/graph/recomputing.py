"""Contexts that a checkpointed function enters again when it runs again in the backward.

PyTorch restores the state of random generators and of autocast there, but not this library's contexts: the call of the
forward is over by then, and another may have begun. So the call's contexts are entered again around the function.
PyTorch has no public hook for checkpoints in other code; therefore its two checkpoint implementations are replaced for
the duration of such a call.
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
"""Factories of the present contexts, outermost first."""

_IS_REENTRANT: ContextVar[bool] = ContextVar("graphpeft_reentrant", default=False)
"""Whether a function of a reentrant checkpoint runs in the present contexts, whose backward runs by itself."""


def is_reentrant() -> bool:
    """Returns whether what the present contexts hold gets no gradients, as a reentrant checkpoint reads it."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _IS_REENTRANT.get()


@contextlib.contextmanager
def taken_along(factory: Factory) -> Iterator[None]:
    """Enters a context, which functions checkpointed inside enter again when they run again."""
    if torch.compiler.is_compiling():
        # a compiler handles checkpoints itself, and can't follow a context variable that is set
        with factory():
            yield
        return
    with _present((*_PRESENT.get(), factory)), factory():
        yield


@contextlib.contextmanager
def _present(factories: tuple[Factory, ...]) -> Iterator[None]:
    """Makes functions that are checkpointed inside enter the contexts of `factories` again."""
    with checkpoints_bound_by(_bound), contextlib.ExitStack() as stack:
        # restored by value: a generator may be closed in another context, where a token can't be reset
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
            # for checkpoints nested in the function
            stack.enter_context(_present(factories))
            for factory in factories:
                stack.enter_context(factory())
            return function(*args, **kwargs)

    return run


# checkpoints

Bind = Callable[[Function], Function]

_LOCK = threading.Lock()
_BINDS: list[tuple[object, Bind]] = []
"""The functions that bind checkpointed functions now, in any thread; one entry for each context."""

os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@contextlib.contextmanager
def checkpoints_bound_by(bind: Bind) -> Iterator[None]:
    """Applies `bind` to each function that is checkpointed inside the context."""
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
            # the same replacement again, since compiled code guards on its identity
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
        bound = _bound_by_all(function)
        return run_again.__get__(None, cls)(_noted(bound) if torch.is_grad_enabled() else bound, *args)

    return classmethod(apply)


def _noted(function: Function) -> Function:
    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            at_end_of(stack, _IS_REENTRANT.set, _IS_REENTRANT.get())
            _IS_REENTRANT.set(True)
            return function(*args, **kwargs)

    return run


_BINDINGS: dict[str, tuple[Any, Any]] = {}
"""The last original of each name, and its replacement."""

_EXCHANGED: list[tuple[Any, str, Any, Any]] = []
"""The replacements in effect: object, attribute, new value and old value."""


def _put_back() -> None:
    while _EXCHANGED:
        owner, name, new, before = _EXCHANGED[-1]
        # a later replacement by other code stays; undoing it restores ours, which has no effect by then
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
