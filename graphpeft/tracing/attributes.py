"""Notes what a forward reads from its modules beside tensors.

A number or a flag becomes a node that reads the attribute in each run; `constant_attributes` may replace it by a
constant. A string, None and other plain values, which code compares by identity, stay what they are, and the graph
checks them. Containers and objects are read once.
"""

from __future__ import annotations

import enum
import inspect
import os
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft.code.identity_checks import compares_objects, uses_is_true
from graphpeft.code.namespaces import attributes_of
from graphpeft.graph import guards, in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.paths import join
from graphpeft.graph.settings import OF_CLASS, WATCH
from graphpeft.graph.template import SIMPLE
from graphpeft.tracing.iterators import draws_error, holds_iterator
from graphpeft.tracing.recorder import Recorder

MACHINERY = frozenset(dir(nn.Module()))
"""What every module has; of these a graph depends on `training` alone, which stays one of its inputs."""

INTERNALS = frozenset((
    "_parameters", "_buffers", "_modules", "parameters", "buffers", "modules", "children", "state_dict",
    "named_parameters", "named_buffers", "named_modules", "named_children", "get_parameter", "get_buffer",
))  # fmt: skip
"""What of that tells which tensors and modules there are: the graph depends on them in a way that isn't noted."""

ABSENT = object()
"""Noted of an attribute that isn't there."""

_NUMBERS = (bool, int, float)


_NOT_THE_CODES = ("__", "_graphpeft_")
"""How names begin of attributes that Python or a graph has put there."""


def noting_reads(tracer: Recorder, root: nn.Module) -> Callable[[nn.Module, str], Any]:
    """Returns how modules look up attributes, so that `tracer` is told which are read from the modules of `root`."""
    # of a scripted module none is read in Python
    paths = {module: path for path, module in root.named_modules() if not isinstance(module, torch.jit.ScriptModule)}
    look_up = nn.Module.__getattribute__
    # what a traced model inside has not to look at again, this trace has to see
    for watch in {id(held): held for module in paths if (held := module.__dict__.get(WATCH))}.values():
        watch.changes += 1

    def note(module: nn.Module, name: str) -> Any:
        if name == "__dict__" and tracer.is_recording and module in paths:
            _note_dictionary(tracer, module, paths[module])
        if name in MACHINERY or name.startswith(_NOT_THE_CODES) or not tracer.is_recording or module not in paths:
            if name in INTERNALS and not _is_of_pytorch(sys._getframe(1).f_code.co_filename):
                if module is root:
                    tracer.session.reads.add(name)
                if tracer.is_recording and "param" in name:
                    _refuse_to_compare(tracer, sys._getframe(1).f_code)
            return look_up(module, name)
        # before it is looked up: tensors and submodules are found by __getattr__, after an AttributeError here
        if module is root:
            tracer.session.reads.add(name)
        try:
            value = look_up(module, name)
        except AttributeError:
            if name in module.__dict__.get(OF_CLASS, ()):
                return _noted(tracer, module, name, join(paths[module], name), module.__getattr__(name))
            parameter = module._parameters.get(name)
            if parameter is not None:
                tracer.session.looked_up = parameter, join(paths[module], name)
            # tensors may be absent, too
            if all(held.get(name) is None for held in (module._parameters, module._buffers, module._modules)):
                tracer.session.read_once.setdefault(join(paths[module], name), ABSENT)
            raise
        return _noted(tracer, module, name, join(paths[module], name), value)

    return note


def _refuse_to_compare(tracer: Recorder, code: CodeType) -> None:
    """Raises TraceError if code that takes parameters from where a module has all of them asks which one it has."""
    if compares_objects(code):
        message = (
            f"{guards.deciding_line()} compares one of all parameters with others by `is`, to which a traced value is "
            "another object; compare their names, or ask for the attribute of the module"
        )
        raise tracer.failing(TraceError(message))


def _noted(tracer: Recorder, module: nn.Module, name: str, path: str, value: Any) -> Any:
    """Returns what the code gets that has read `value`, which the attribute of this name has."""
    is_own = name in module.__dict__
    is_of_class = name in module.__dict__.get(OF_CLASS, ()) or _is_of_class(type(module), name, value)
    if is_plain(value) and (is_own or is_of_class):
        # what the forward itself has set is a value of this run
        recording = tracer.session.recording
        if is_own and recording is not None and not recording.before.has(module, name, value):
            return value
        if path not in tracer.session.lines_of_reads:
            tracer.session.lines_of_reads[path] = guards.deciding_line()
        return plain_or_proxy(tracer, module, path, value)
    if is_own and path not in tracer.session.read_once and not guards.is_machinery(sys._getframe(2).f_code.co_filename):
        _refuse_iterator(tracer, module, name, value)
        tracer.session.read_once[path] = value
    return value


def _refuse_iterator(tracer: Recorder, module: nn.Module, name: str, value: Any) -> None:
    recording = tracer.session.recording
    # from what the forward itself has set, it draws anew in each run
    if holds_iterator(value) and recording is not None and recording.before.has(module, name, value):
        raise tracer.failing(draws_error(f"self.{name}"))


def _note_dictionary(tracer: Recorder, module: nn.Module, path: str) -> None:
    file = sys._getframe(2).f_code.co_filename
    if not guards.is_machinery(file) and not file.startswith(_PYTORCH):
        for name, value in (attributes_of(module) or {}).items():
            _refuse_iterator(tracer, module, name, value)
        tracer.session.read_once.setdefault(join(path, "__dict__"), {})


_PYTORCH = os.path.dirname(torch.__file__)


def is_plain(value: Any) -> bool:
    """Returns whether `value` can't change and says all about itself: a number, a string, None or a tuple of such."""
    kind = type(value)  # isinstance asks an object of a user's for its __class__
    if kind in (tuple, torch.Size):
        return all(map(is_plain, value))
    return kind in SIMPLE or issubclass(kind, enum.Enum)


def _is_of_class(cls: type, name: str, value: Any) -> bool:
    return any(vars(base)[name] is value for base in cls.__mro__ if name in vars(base))


def plain_or_proxy(tracer: Recorder, module: nn.Module, path: str, value: Any) -> Any:
    """Returns a plain attribute: a number as an input of the graph, unless its code compares by identity."""
    proxy = tracer.attribute(path)
    if not isinstance(proxy, fx.Proxy):
        return proxy  # what is None or a string comes back from the tracer as it is
    if type(value) not in _NUMBERS or uses_is_true(in_place.original_class(module)):
        tracer.decide(proxy, value)
        return value
    return proxy


def _is_of_pytorch(file: str) -> bool:
    return file == inspect.getfile(nn.Module) or guards.is_machinery(file)
