"""Changes of a model that are undone if the call that makes them fails, by any error or interruption.

A call that changes a model runs inside `transaction`. The functions here log how to undo a change before they make it;
outside a transaction they only make it. So the overhead of a call grows with its changes, not with the model.

Values are copied before a tensor is written, so undoing needs no memory. Calls that change one model wait for each
other.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Begin(int):
    """The index in the undo log at which a transaction begins; an object of its own for each.

    Attributes:
        home: The id of the frame of the function in which the transaction's context is; None for no transaction.
        outer: The beginning of the transaction around it.
    """

    home: int | None = None
    outer: Begin


class _Journal:
    """The undo log of a thread's transactions; the last entry is undone first.

    Attributes:
        undo: The undo functions with their arguments.
        begin: The index in `undo` at which the innermost transaction begins.
        remembered: The index in `undo` of the saved content of a tensor or a dictionary, by the object's id.
    """

    def __init__(self) -> None:
        self.undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.begin = Begin()
        self.remembered: dict[int, int] = {}

    def knows(self, of: Any) -> bool:
        """Returns whether the innermost transaction has saved the content of a tensor or a dictionary already."""
        return self.remembered.get(id(of), -1) >= self.begin

    def restore_by(self, function: Callable[..., Any], of: Any, content: Any) -> None:
        """Saves the content of a tensor or a dictionary."""
        self.remembered[id(of)] = len(self.undo)
        # the entry keeps the object alive, so that no other object gets its id
        self.undo.append((function, (of, content)))

    def end_suspended(self) -> None:
        """Undoes transactions whose functions have ended, since an interruption came before their contexts' own end."""
        while self.begin.home is not None and not _is_running(self.begin.home):
            self.roll_back(self.begin)
            self.begin = self.begin.outer

    @torch.no_grad()
    def roll_back(self, begin: int) -> None:
        """Undoes all changes from the index `begin` on; after an interruption, it can be called again."""
        failed: list[Exception] = []
        while len(self.undo) > begin:
            function, args = self.undo[-1]
            try:
                try:
                    function(*args)
                except Exception:
                    function(*args)  # memory may be free by now; an undo may be repeated
            except Exception as error:
                failed.append(error)
            self.undo.pop()
        self.remembered = {known: place for known, place in self.remembered.items() if place < begin}
        if failed:
            raise RuntimeError(
                f"a change of the model failed and could not be taken back whole ({failed[0]}); build the model anew"
            ) from failed[0]


def _is_running(frame: int) -> bool:
    """Returns whether a function of this thread is running, by the id of its frame."""
    running = sys._getframe(1)
    while running is not None and id(running) != frame:
        running = running.f_back
    return running is not None


def _none() -> None:
    return None


class _Thread(threading.local):
    # weak, so that a journal ends with the calls that use it, however they end
    journal: Callable[[], _Journal | None] = staticmethod(_none)


_THREAD = _Thread()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""A lock for each model: one thread at a time changes it."""

os.register_at_fork(after_in_child=_LOCKS.clear)


def lock_of(model: nn.Module) -> Any:
    """Returns the lock under which a model is changed."""
    # no setdefault at first, since compiled code can't follow the creation of a lock
    lock = _LOCKS.get(model)
    return _LOCKS.setdefault(model, threading.RLock()) if lock is None else lock


@contextlib.contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Undoes all changes made in the context if it ends with an error; other threads that change `model` wait.

    Transactions can be nested: the inner one undoes its own changes, the outer one undoes all.
    """
    with recorded(model) as begin:
        try:
            yield
        except BaseException:
            undo(begin)
            raise


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[Begin]:
    """Begins a transaction of this thread, and ends it; yields where in the undo log it begins."""
    with lock_of(model):
        journal = _THREAD.journal()
        if journal is None:
            journal = _Journal()
            _THREAD.journal = weakref.ref(journal)
        frame: Any = sys._getframe(1)
        while frame.f_code.co_flags & inspect.CO_GENERATOR or frame.f_code.co_filename == contextlib.__file__:
            frame = frame.f_back  # the generator of a context is suspended while the context's body runs
        home = id(frame)
        while frame is not None and id(frame) != journal.begin.home and journal.begin.home is not None:
            frame = frame.f_back
        if frame is None:
            journal.end_suspended()
        del frame
        begin = Begin(len(journal.undo))
        begin.home, begin.outer = home, journal.begin
        journal.begin = begin
        try:
            yield begin
        finally:
            if journal.begin is begin:
                journal.begin = begin.outer
            # a traceback keeps local variables alive, and must not keep the journal
            del journal


def undo(begin: Begin) -> None:
    """Undoes the changes of this thread's innermost transaction, if it is this one.

    One that an interruption left suspended ends when it is collected, in the midst of whatever its thread does then, or
    when its thread begins another one.
    """
    journal = _THREAD.journal()
    if journal is None or journal.begin is not begin:
        return
    try:
        journal.roll_back(begin)
    finally:
        journal.roll_back(begin)  # undoes the rest, if the user interrupts the first call


def at_end_of(stack: contextlib.ExitStack, function: Callable[..., Any], *args: Any) -> None:
    """Makes a stack call a function when it closes, and again if the first call is interrupted."""
    pending = [function]

    def call() -> None:
        if pending:
            function(*args)
            pending.clear()

    stack.callback(call)
    stack.callback(call)


def undone_by(function: Callable[..., Any], *args: Any) -> None:
    """Logs a call that undoes the next change; the call must be harmless if that change isn't made."""
    journal = _THREAD.journal()
    if journal is not None:
        journal.undo.append((function, args))


def set_attribute(of: Any, name: str, value: Any) -> None:
    """Sets an existing attribute."""
    undone_by(setattr, of, name, getattr(of, name))
    setattr(of, name, value)


def set_item(of: dict[Any, Any], key: Any, value: Any) -> None:
    """Sets an item of a dictionary."""
    journal = _THREAD.journal()
    if journal is not None and not journal.knows(of):
        journal.undo.append((of.__setitem__, (key, of[key])) if key in of else (of.pop, (key, None)))
    of[key] = value


def set_items(of: dict[Any, Any], items: Mapping[Any, Any]) -> None:
    """Sets items of a dictionary."""
    journal = _THREAD.journal()
    if items and journal is not None and not journal.knows(of):
        journal.restore_by(_refill, of, dict(of))
    of.update(items)


def delete_item(of: dict[Any, Any], key: Any) -> None:
    """Deletes an item of a dictionary, if present."""
    if key not in of:
        return
    journal = _THREAD.journal()
    if journal is not None and not journal.knows(of):
        # all items, since restoring only this one would put it last
        journal.restore_by(_refill, of, dict(of))
    del of[key]


def _refill(of: dict[Any, Any], items: dict[Any, Any]) -> None:
    of.clear()
    of.update(items)


def remember(tensor: torch.Tensor, copied: torch.Tensor | None = None) -> None:
    """Saves the values of a tensor before they are overwritten.

    The copy of an accelerator's tensor is in main memory, which is larger.
    """
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} was made in torch.inference_mode(), so it can't be changed "
            "outside; make this call in torch.inference_mode(), or build or load the model outside of it"
        )
    journal = _THREAD.journal()
    if journal is not None and not journal.knows(tensor):
        journal.restore_by(_overwrite, tensor, _copy(tensor) if copied is None else copied)


def _overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    tensor.copy_(values)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # a tensor subclass may change on the way to main memory and back
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)
    is_elsewhere = is_plain and tensor.device.type not in ("cpu", "meta")
    return tensor.detach().cpu() if is_elsewhere else tensor.detach().clone()
