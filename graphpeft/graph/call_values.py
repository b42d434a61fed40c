"""Values that hold during a call: context variables that compiled code can read.

A context variable has a value of its own in each task and thread. `torch.compile` can't follow a context variable that
is set, but it follows a thread-local attribute. So the attribute has the value, too, where a thread runs one call at a
time. In a thread that runs tasks, compiled code can't know the value and raises an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

from graphpeft.transaction import at_end_of

T = TypeVar("T")


class _Thread(threading.local):
    """The value for compiled code.

    Attributes:
        value: The value of the current call; only in a thread that runs no tasks.
        tasks: A token for each task of the thread that has a value.
        is_shared: Whether any task has a value.
    """

    # instance attributes, since Dynamo has no guards for class attributes
    def __init__(self) -> None:
        self.value: Any = None
        self.tasks: set[object] = set()
        self.is_shared = False


class PerCall(Generic[T]):
    """A value that holds during a call, or None."""

    def __init__(self, name: str, way_out: str) -> None:
        self._of_context: ContextVar[T | None] = ContextVar(f"graphpeft_{name}", default=None)
        self._of_thread = _Thread()
        self._refusal = f"compiled code can't tell the {name} of one asyncio task from those of another: {way_out}"

    def get(self) -> T | None:
        """Returns the value of the current call, or None."""
        if not torch.compiler.is_dynamo_compiling():
            value = self._of_context.get()
            return self._of_thread.value if value is None else value
        if self._of_thread.is_shared:
            raise RuntimeError(self._refusal)
        return self._of_thread.value

    @contextlib.contextmanager
    def during(self, value: T) -> Iterator[None]:
        """Sets the value for calls inside the context."""
        thread = self._of_thread
        if torch.compiler.is_dynamo_compiling():
            before, was_shared = thread.value, thread.is_shared
            thread.value, thread.is_shared = value, False
            try:
                yield
            finally:
                thread.value, thread.is_shared = before, was_shared
            return
        # each setting is undone even if an interrupt stops the undoing of another
        with contextlib.ExitStack() as stack:
            if _runs_tasks():
                task = object()
                at_end_of(stack, _leave, thread, task)
                thread.tasks.add(task)
                thread.is_shared = True
            else:
                at_end_of(stack, setattr, thread, "value", thread.value)
                thread.value = value
            # restored by value: a generator may be closed in another context, where a token can't be reset
            at_end_of(stack, self._of_context.set, self._of_context.get())
            self._of_context.set(value)
            yield


def _runs_tasks() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _leave(thread: _Thread, task: object) -> None:
    thread.tasks.discard(task)
    thread.is_shared = bool(thread.tasks)
