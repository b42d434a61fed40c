"""Which adapter each row of a batch has, for the time of a call: a context variable.

So tasks and threads each have their own. `torch.compile` can't follow a context variable that is set, but it follows an
attribute of the thread. Therefore rows are noted there, too, as far as one thread runs one call at a time; where it
runs tasks, compiled code refuses what it can't know.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

from graphpeft.transaction import at_end_of


class RowParameters(Protocol):
    """The parameters and numbers of the adapters of a tensor's rows, as graphs for mixed batches read them."""

    def stacked(self, owner: nn.Module, stem: str, where: Any) -> torch.Tensor:
        """Returns the parameters `stem` of `owner`, one for each row in a first dimension."""
        ...

    def number(self, owner: nn.Module, stem: str, missing: float | None) -> Any:
        """Returns the number `stem` of `owner`: one for all rows, or a tensor with one for each row."""
        ...


class PresentRows(Protocol):
    """The adapters of the rows of a call, as its regions ask for them."""

    @property
    def runners(self) -> Mapping[int, Callable[..., Any]]:
        """How each region runs, by the id of its module."""
        ...

    @property
    def are_off(self) -> bool:
        """Whether the model's adapters were disabled since."""
        ...

    def of(self, tensor: torch.Tensor) -> RowParameters:
        """Returns the parameters of the adapters of the rows of `tensor`."""
        ...


class _Thread(threading.local):
    """The rows for compiled code.

    Attributes:
        rows: The rows of the present call; only those of a thread that runs no tasks.
        tasks: What stands for each task of the thread that has rows.
        is_shared: Whether any has.
    """

    # attributes of the instance: Dynamo has no guards for those of the class
    def __init__(self) -> None:
        self.rows: PresentRows | None = None
        self.tasks: set[object] = set()
        self.is_shared = False


_OF_CONTEXT: ContextVar[PresentRows | None] = ContextVar("graphpeft_rows", default=None)
_OF_THREAD = _Thread()


def rows_if_any() -> PresentRows | None:
    """Returns the rows of the present call, or None.

    Raises:
        RuntimeError: If compiled code asks in a thread some of whose tasks have rows.
    """
    if not torch.compiler.is_compiling():
        rows = _OF_CONTEXT.get()
        return _OF_THREAD.rows if rows is None else rows
    if _OF_THREAD.is_shared:
        raise RuntimeError(
            "compiled code can't tell the rows of one asyncio task from those of another: pass adapter_names to the "
            "compiled model instead of entering mixed_batch around it, or run it in a thread (asyncio.to_thread)"
        )
    return _OF_THREAD.rows


def present() -> Any:
    """Returns the rows of the present call."""
    rows = rows_if_any()
    assert rows is not None
    return rows


@contextlib.contextmanager
def rows_present(rows: PresentRows) -> Iterator[None]:
    """Lets calls in a context have these rows."""
    if torch.compiler.is_compiling():
        before, was_shared = _OF_THREAD.rows, _OF_THREAD.is_shared
        _OF_THREAD.rows, _OF_THREAD.is_shared = rows, False
        try:
            yield
        finally:
            _OF_THREAD.rows, _OF_THREAD.is_shared = before, was_shared
        return
    # each is put back even where somebody interrupts that
    with contextlib.ExitStack() as stack:
        if _runs_tasks():
            task = object()
            at_end_of(stack, _leave, task)
            _OF_THREAD.tasks.add(task)
            _OF_THREAD.is_shared = True
        else:
            at_end_of(stack, setattr, _OF_THREAD, "rows", _OF_THREAD.rows)
            _OF_THREAD.rows = rows
        # not by a token, which another context may have made: that of a generator's caller
        at_end_of(stack, _OF_CONTEXT.set, _OF_CONTEXT.get())
        _OF_CONTEXT.set(rows)
        yield


def _runs_tasks() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _leave(task: object) -> None:
    _OF_THREAD.tasks.discard(task)
    _OF_THREAD.is_shared = bool(_OF_THREAD.tasks)
