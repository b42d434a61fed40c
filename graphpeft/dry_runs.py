"""Dry runs: changes of a model that no call of another thread sees, and that are undone in the end.

A forward asks for no lock, since that would cost each call its time. So a dry run exchanges how modules are called, and
begins when the stack of no other thread shows a call that began before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from graphpeft._torch import call_modules_by, call_with_hooks, is_in_backward
from graphpeft.transaction import at_end_of, lock_of, recorded, undo

_PATIENCE = 600.0
"""Seconds after which a thread that waits for another one gives up: they may wait for each other."""

_BLOCKED = 5.0
"""Seconds for which a thread that runs a model alone may wait for others before their calls of the model give up."""

_PAUSE, _LOOK = 0.001, 0.1
"""Seconds between two looks at other threads: of one that waits for the end of calls, and of a call that is held."""


@contextlib.contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Undoes all changes made in the context when it ends, by an error or not; other threads wait, see `alone`."""
    with alone(model), recorded(model) as begin, contextlib.ExitStack() as stack:
        at_end_of(stack, undo, begin)
        yield


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Lets other threads wait that change `model`, or call it or a module inside."""
    with lock_of(model), contextlib.ExitStack() as stack:
        taken: list[bool] = []
        # each in one step of Python's: an interrupt between two would leave the lock taken
        release: Any = _ONE_AT_A_TIME.__exit__
        stack.callback(list, map(release, taken))
        taken += filter(None, map(_ONE_AT_A_TIME.acquire, (True,), (_PATIENCE,)))
        if not taken:
            raise RuntimeError(
                f"another thread runs a model alone, as check_learning does, and this one has waited {_PATIENCE:g} "
                "seconds for the end of that; run them one after the other"
            )
        if not any(gate.model is model for gate in _GATES):
            gate = _Gate(model)
            at_end_of(stack, gate.open)
            gate.close()
        yield


class _Gate:
    """Holds calls of a model's modules, those of its own thread aside."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._owner = model, threading.get_ident()
        self._modules = {id(module) for module in model.modules()}
        self._is_closed, self._opened = False, threading.Event()
        self.before: Any = call_with_hooks

    def close(self) -> None:
        """Holds new calls, and waits for those that have begun."""
        _GATES.append(self)
        self.before = call_modules_by(_call_through_gates)
        ends = time.monotonic() + _PATIENCE
        while self._is_called_elsewhere():
            if time.monotonic() > ends:
                raise RuntimeError(
                    f"another thread runs the {type(self.model).__name__}, and this one has waited for the end of that "
                    f"call for {_PATIENCE:g} seconds; run them one after the other"
                )
            time.sleep(_PAUSE)
        self._is_closed = True

    def open(self) -> None:
        """Lets all calls go on."""
        if self in _GATES:
            call_modules_by(self.before)
            _GATES.remove(self)
        self._opened.set()

    def hold(self, module: nn.Module) -> None:
        """Returns when a module may be called."""
        # what is recomputed in a backward may run in a thread of PyTorch's own, on behalf of any other
        if threading.get_ident() == self._owner or id(module) not in self._modules or is_in_backward():
            return
        if not self._is_closed and self._is_called_in(sys._getframe()):
            return  # a part of a call that has begun
        began = blocked = time.monotonic()
        while not self._opened.wait(_LOOK):
            now = time.monotonic()
            blocked = blocked if self._is_owner_waiting() else now
            if now - blocked > _BLOCKED or now - began > _PATIENCE:
                raise RuntimeError(
                    f"another thread runs the model of this {type(module).__name__} alone, as check_learning does, and "
                    f"hasn't ended that for {now - began:.0f} seconds: run them one after the other. A forward that "
                    "calls its modules in threads of its own waits for such a call, and can't be run so"
                )

    def _is_owner_waiting(self) -> bool:
        """Returns whether the thread that runs the model alone waits for another thread."""
        frame = sys._current_frames().get(self._owner)
        return frame is not None and frame.f_code.co_filename == threading.__file__

    def _is_called_elsewhere(self) -> bool:
        frames = sys._current_frames()
        return any(self._is_called_in(frame) for thread, frame in frames.items() if thread != self._owner)

    def _is_called_in(self, frame: FrameType | None) -> bool:
        """Returns whether a frame, or one around it, is a call of one of the modules."""
        while frame is not None:
            called: Any = None
            if frame.f_code is call_with_hooks.__code__:
                called = frame.f_locals["self"]
            elif frame.f_code is _call_through_gates.__code__ and frame.f_locals.get("is_through"):
                called = frame.f_locals["module"]
            if id(called) in self._modules:
                return True
            frame = frame.f_back
        return False


_ONE_AT_A_TIME = threading.RLock()
"""Allows one thread to hold calls: two could wait for each other at modules that two models share."""

_GATES: list[_Gate] = []
"""The gates of the thread that has the lock."""


def _call_through_gates(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    is_through, gates = False, [*_GATES]
    while not is_through:
        gates = [*_GATES]
        for gate in gates:
            gate.hold(module)
        # a gate that closes from here on sees that in this frame, and one that has closed is held at
        is_through = True
        if gates != _GATES:
            is_through = False
    return (gates[0].before if gates else call_with_hooks)(module, *args, **kwargs)


def _open_all() -> None:
    for gate in reversed([*_GATES]):
        gate.open()
    _ONE_AT_A_TIME.release()


if hasattr(os, "register_at_fork"):
    # a process forked meanwhile would lack the thread that opens the gates
    os.register_at_fork(before=_ONE_AT_A_TIME.acquire, after_in_parent=_ONE_AT_A_TIME.release, after_in_child=_open_all)
