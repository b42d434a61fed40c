"""Values for the time of a call: context variables that compiled code can read.

So tasks and threads each have their own. `torch.compile` can't follow a context variable that is set, but it follows an
attribute of the thread. Therefore a value is noted there, too, as far as one thread runs one call at a time; where it
runs tasks, compiled code refuses what it can't know.
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
        value: That of the present call; only in a thread that runs no tasks.
        tasks: What stands for each task of the thread that has a value.
        is_shared: Whether any has.
    """

    # attributes of the instance: Dynamo has no guards for those of the class
    def __init__(self) -> None:
        self.value: Any = None
        self.tasks: set[object] = set()
        self.is_shared = False


class PerCall(Generic[T]):
    """A value that a call has, or None.

    Args:
        name: What it is called, for the context variable.
        way_out: What to do where compiled code in one of several tasks asks for it.
    """

    def __init__(self, name: str, way_out: str) -> None:
        self._of_context: ContextVar[T | None] = ContextVar(f"graphpeft_{name}", default=None)
        self._of_thread = _Thread()
        self._refusal = f"compiled code can't tell the {name} of one asyncio task from those of another: {way_out}"

    def get(self) -> T | None:
        """Returns the value of the present call, or None.

        Raises:
            RuntimeError: If compiled code asks in a thread some of whose tasks have one.
        """
        if not torch.compiler.is_compiling():
            value = self._of_context.get()
            return self._of_thread.value if value is None else value
        if self._of_thread.is_shared:
            raise RuntimeError(self._refusal)
        return self._of_thread.value

    @contextlib.contextmanager
    def during(self, value: T) -> Iterator[None]:
        """Lets calls in a context have this value."""
        thread = self._of_thread
        if torch.compiler.is_compiling():
            before, was_shared = thread.value, thread.is_shared
            thread.value, thread.is_shared = value, False
            try:
                yield
            finally:
                thread.value, thread.is_shared = before, was_shared
            return
        # each is put back even where somebody interrupts that
        with contextlib.ExitStack() as stack:
            if _runs_tasks():
                task = object()
                at_end_of(stack, _leave, thread, task)
                thread.tasks.add(task)
                thread.is_shared = True
            else:
                at_end_of(stack, setattr, thread, "value", thread.value)
                thread.value = value
            # not by a token, which another context may have made: that of a generator's caller
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
