"""Checks, in each run of a graph, of the branches that the trace took on example values.

A model's Python code branches on shapes, dtypes and arguments. The tracer follows the example's branch and adds a call
of `expect` to the graph. A run that would take another branch raises `GuardError` instead of following the wrong one.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
import traceback
from collections.abc import Iterable
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.fx as fx
from torch.fx.node import has_side_effect

from graphpeft._torch import pytree
from graphpeft.graph.errors import GuardError
from graphpeft.wording import shortened, shown

_WAY_OUT = (
    "Trace or adapt the model again, with example_inputs like this call's and its modules in their present modes. Or "
    "adapt it without example_inputs: then code that decides by its inputs runs by itself, on changed weights; an "
    "argument with a default has that alone, where the code decides by it."
)


# without this mark, fx's dead code elimination would drop the check
@has_side_effect
def expect(value: Any, expected: Any, decision: str) -> None:
    """Raises `GuardError` unless `value` equals its value in the trace."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", expect, (value, expected, decision), {})
    elif not is_same(value, expected):
        raise GuardError(
            f"{decision}: that was {_shown(expected)} when the graph was recorded and is {_shown(value)} now. "
            + _WAY_OUT
        )


def is_same(value: Any, expected: Any) -> bool:
    """Returns whether a value equals the expected one; NaN equals NaN, and tensors compare by identity."""
    if value is expected or isinstance(value, torch.Tensor):
        return value is expected
    return value == expected or (_is_nan(value) and _is_nan(expected))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


@has_side_effect
def expect_each(values: tuple[Any, ...], expected: tuple[Any, ...], decisions: tuple[str, ...]) -> None:
    """Raises `GuardError` unless each value equals its value in the trace; arguments as for `expect`, one per value."""
    if values is not expected and values != expected:
        for value, before, decision in zip(values, expected, decisions, strict=True):
            expect(value, before, decision)


@has_side_effect
def expect_present(value: Any, decision: str) -> None:
    """Raises `GuardError` if `value` is None, which it was not in the trace.

    A proxy can't record ``x is None``: a proxy isn't None, so the traced code followed the branch of another value.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", expect_present, (value, decision), {})
    elif value is None:
        raise GuardError(f"{decision}: that is None now, and was not when the graph was recorded. {_WAY_OUT}")


@has_side_effect
def expect_number(value: Any, decision: str) -> None:
    """Raises `GuardError` unless `value` is a number of Python's, as it was in the trace.

    A tensor in its place may have attributes by which the traced code would have decided otherwise.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", expect_number, (value, decision), {})
    elif type(value) not in _NUMBERS:
        raise GuardError(
            f"{decision}: that is {_shown(value)} now, and was a number when the graph was recorded. {_WAY_OUT}"
        )


CHECKS = (expect, expect_present, expect_number)
"""The checks of single values, which a trace records."""

_NUMBERS = (bool, int, float, complex, torch.SymBool, torch.SymInt, torch.SymFloat)


def refuse(reason: str) -> NoReturn:
    """Raises `GuardError` for a reason other than a changed value."""
    raise GuardError(f"{reason}. {_WAY_OUT}")


def fixed(name: str, value: Any) -> property:
    """Returns a property in the place of an attribute, which refuses any other value than this one."""

    def read(module: Any) -> Any:
        return vars(module)[name]

    def write(module: Any, other: Any) -> None:
        if other != value:
            refuse_other(module, name, repr(value), repr(other))
        vars(module)[name] = other

    return property(read, write)


def refuse_other(module: Any, name: str, was: str, now: str) -> NoReturn:
    """Raises `GuardError` for another value of an attribute that is a constant of a module's graph."""
    raise GuardError(
        f"{name} of a {type(module).__name__} was {was} when it was adapted, and is to be {now} now, which its graph "
        "doesn't know; set it before you adapt the model"
    )


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)


def fixed_arguments(graphs: Iterable[fx.Graph]) -> tuple[str, ...]:
    """Returns the arguments that must have one value in all calls of some graph, each as ``name=value``."""
    checks = [node.args for graph in graphs for node in graph.nodes if node.target is expect]
    found = [(value.target, expected) for value, expected, _ in checks if getattr(value, "op", None) == "placeholder"]
    return tuple(dict.fromkeys(f"{name}={shortened(_shown(expected))}" for name, expected in found))


def kind(value: Any) -> str:
    """Returns the type name of `value`, for checks of ``isinstance``; "Tensor" for every tensor."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", kind, (value,), {})  # type: ignore[return-value]
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def is_machinery(file: str) -> bool:
    """Returns whether `file` belongs to the tracer or to the parts of PyTorch that it is built on."""
    return file.startswith(_MACHINERY)


def deciding_frame() -> FrameType:
    """Returns the innermost running frame of the model's code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def calling_place() -> tuple[str, int]:
    """Returns the file and the number of the running line of the model's code, outside PyTorch's own functions."""
    frame = deciding_frame()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_FUNCTIONS + _MACHINERY):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def deciding_line() -> str:
    """Returns the running line of the model's code, as ```code` (file:line)``."""
    frame = deciding_frame()
    return _shown_line(frame.f_code.co_filename, frame.f_lineno)


def failing_line(error: BaseException) -> str:
    """Returns the innermost line in an error's traceback outside PyTorch and the tracer."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    outside = [line for line in lines if not line[0].startswith((*_MACHINERY, os.path.dirname(torch.__file__)))]
    return _shown_line(*outside[-1]) if outside else "its call"


def _shown_line(file: str, line: int) -> str:
    return f"`{linecache.getline(file, line).strip()}` ({os.path.basename(file)}:{line})"


_MACHINERY = (
    os.path.dirname(os.path.dirname(__file__)),
    os.path.dirname(fx.__file__),
    torch.overrides.__file__,
    os.path.dirname(pytree.__file__),
)

_FUNCTIONS = (str(torch.nn.functional.__file__), str(torch.functional.__file__))
