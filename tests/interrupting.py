"""Lets calls fail at any line of this library, or at any of PyTorch's operations, and tells what a model is then."""

from __future__ import annotations

import builtins
import contextlib
import copy
import dis
import functools
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphpeft
from graphpeft.adapters.state import adapters_of
from graphpeft.graph import in_place
from graphpeft.graph.template import worn_template
from graphpeft.tracing.record import ONE_TRACE_AT_A_TIME

_LIBRARY = os.path.dirname(graphpeft.__file__)

Line = tuple[str, int]
"""A file of this library and the number of a line."""


def lines_of(call: Callable[[], Any]) -> list[Line]:
    """Returns the lines of this library that a call runs, in turn."""
    lines: list[Line] = []
    with _at_lines(lambda line: lines.append(line)):
        call()
    return lines


@contextlib.contextmanager
def failing_at_line(number: int, error: type[BaseException], then: int = 0) -> Iterator[list[Line]]:
    """Raises an error before the line of this library of this number runs, and again so many lines later, if any.

    Gives the lines where it does.
    """
    count, lines = 0, []

    def fail(line: Line) -> None:
        nonlocal count
        count += 1
        if count == number or (then and count == number + then):
            lines.append(line)
            raise error("planted")

    with _at_lines(fail):
        yield lines


_LEAVING = {
    ("LOAD_CONST", "LOAD_CONST", "LOAD_CONST", "CALL"),
    ("LOAD_CONST", "DUP_TOP", "DUP_TOP", "CALL_FUNCTION"),  # Python 3.10's
}
"""The instructions by which a ``with`` leaves its context."""


@functools.cache
def _uninterrupted(code: types.CodeType) -> frozenset[int]:
    """Returns the offsets at which lines begin where Python doesn't look whether it is interrupted.

    It does nothing at a ``try``, and where a ``with`` is about to leave its context.
    """
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("PRECALL", "CACHE")]
    found = {each.offset for each in instructions if each.opname == "NOP"}
    for number, each in enumerate(instructions):
        following = instructions[number : number + 4]
        is_leaving = tuple(one.opname for one in following) in _LEAVING
        if is_leaving and all(one.argval is None for one in following[:3] if one.opname == "LOAD_CONST"):
            found.add(each.offset)
            before = number
            while before and instructions[before - 1].opname in ("SWAP", "ROT_TWO"):
                before -= 1
                found.add(instructions[before].offset)
    return frozenset(found)


@functools.cache
def _file_of(code: types.CodeType) -> str:
    # cached, since there are parts of the library that mind the time
    return os.path.relpath(code.co_filename, _LIBRARY)


@contextlib.contextmanager
def _at_lines(see: Callable[[Line], None]) -> Iterator[None]:
    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lasti not in _uninterrupted(frame.f_code):
            see((_file_of(frame.f_code), frame.f_lineno))
        return trace

    def enter(frame: Any, *_: Any) -> Any:
        return trace if frame.f_code.co_filename.startswith(_LIBRARY) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


class FailingAtOperation(TorchDispatchMode):
    """Raises an error in place of an operation of PyTorch, and from then on whenever one needs memory.

    Args:
        number: The number of the operation; none fails at 0.
        error: The error.
        name: The name of the operations that are counted; all if None.
    """

    def __init__(self, number: int, error: BaseException | None = None, name: str | None = None) -> None:
        super().__init__()
        self.count, self._number, self._error, self._name = 0, number, error, name
        self._is_out = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        is_counted = self._name in (None, name)
        self.count += is_counted
        is_now = is_counted and self.count == self._number
        if self._error is not None and (is_now or (self._is_out and name not in _NEED_NO_MEMORY)):
            self._is_out = True
            raise self._error
        return func(*args, **(kwargs or {}))


_NEED_NO_MEMORY = ("aten::copy_", "aten::detach")


def state_of(model: Any, *inputs: Any) -> dict[str, Any]:
    """Returns all that a call may change of a model, in a form that can be compared."""
    with torch.no_grad():
        output = model(*inputs)
        output = output if isinstance(output, torch.Tensor) else output.logits
    state = adapters_of(model)
    return {
        "output": _bits(output),
        "tensors": [(name, _bits(tensor)) for name, tensor in model.state_dict().items()],
        "trained": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "buffers": [(name, buffer.requires_grad) for name, buffer in model.named_buffers()],
        "modes": [module.training for module in model.modules()],
        "classes": [(path, _dress(module)) for path, module in model.named_modules()],
        "attributes": [(path, _attributes(module)) for path, module in model.named_modules()],
        "config": copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None,
        "adapters": None if state is None else _known(state),
    }


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def _dress(module: nn.Module) -> tuple[Any, ...]:
    template = worn_template(module)
    kinds = [layer.kind for layer in in_place.layers_of(module)]
    reads = [sorted(layer.namespace) for layer in in_place.layers_of(module) if layer.kind == "tensors"]
    code = None if template is None else [code.src for code in template.codes]
    return in_place.original_class(module).__name__, kinds, reads, code


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    hooks = [(name, len(value)) for name, value in vars(module).items() if "hooks" in name and value]
    plain = [(name, value) for name, value in vars(module).items() if isinstance(value, int | float | str | None)]
    return [*sorted((*plain, *hooks), key=lambda pair: pair[0]), ("names", sorted(vars(module)))]


def _known(state: Any) -> dict[str, Any]:
    originals = [(place, _bits(tensor)) for place, tensor in state.originals.items()]
    inside = {
        name: (
            copy.deepcopy(vars(adapter.config)),
            [(adapted.site.label, dict(adapted.names), dict(adapted.constants)) for adapted in adapter.sites],
            adapter.fully_trained,
            list(adapter.rows),
            [(place, _bits(tensor)) for place, tensor in adapter.overwritten.items()],
        )
        for name, adapter in state.by_name.items()
    }
    names = ("active", "acting", "read", "merged", "passes", "is_disabled")
    return {
        **{name: copy.copy(getattr(state, name)) for name in names},
        "adapters": list(inside.items()),
        "pauses": len(state.pauses),
        "lifted": sorted(state.lifted),
        "originals": originals,
        "replicated": state.replication is not None,
    }


def exchanged_in_pytorch() -> dict[str, Any]:
    """Returns all that a trace exchanges outside of a model, and that no call may leave exchanged."""
    modules = {
        "torch": torch,
        "random": torch.random,
        "module": nn.Module,
        "checkpoint": torch.utils.checkpoint,
        "autocast": torch.autocast,
        "function": torch.autograd.Function,
        "gradients": torch.set_grad_enabled,
        "tensor": torch.Tensor,
    }
    found = {f"{name}.{key}": id(value) for name, of in modules.items() for key, value in list(vars(of).items())}
    return found | {
        "isinstance": id(builtins.isinstance),
        "with gradients": torch.is_grad_enabled(),
        "modes": torch._C._len_torch_function_stack(),
        "lock": _is_free(),
        "finders": [id(finder) for finder in sys.meta_path],
    }


def _is_free() -> bool:
    """Returns whether another thread can trace."""
    found: list[bool] = []

    def ask() -> None:
        found.append(ONE_TRACE_AT_A_TIME.acquire(blocking=False))
        if found[0]:
            ONE_TRACE_AT_A_TIME.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]
