"""Records the non-tensor attributes that a forward reads from its modules.

A number or a flag becomes a node that reads the attribute in each run; `constant_attributes` may replace the node by a
constant. Strings, None and other plain values, which code compares by identity, become constants that the graph checks.
Containers and objects are read once, while tracing.
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
"""Attributes of every module. A graph depends on none of them except `training`, which it reads in each run."""

_LISTS = frozenset(("_modules", "modules", "children", "named_modules", "named_children"))
"""Attributes that list a layer's submodules, whose names and classes are facts of a recording."""

ABSENT = object()
"""The recorded value of a missing attribute."""

_NUMBERS = (bool, int, float)


_INTERNAL_PREFIX = "_graphpeft_"
"""The prefix of attributes that graphpeft sets."""


def noting_reads(tracer: Recorder, root: nn.Module) -> Callable[[nn.Module, str], Any]:
    """Returns a `__getattribute__` for modules that reports reads from the modules of `root` to `tracer`."""
    # attributes of a scripted module aren't read in Python
    modules = {path: module for path, module in root.named_modules() if not isinstance(module, torch.jit.ScriptModule)}
    # by their ids, since a class may have a hash of its own, which reads attributes
    paths = {id(module): path for path, module in modules.items()}
    look_up = nn.Module.__getattribute__
    # a traced model inside reads its settings again only after a change, and this trace must record these reads
    for watch in {id(held): held for module in modules.values() if (held := module.__dict__.get(WATCH))}.values():
        watch.changes += 1

    def note(module: nn.Module, name: str) -> Any:
        path = paths.get(id(module))
        if name == "__dict__" and tracer.is_recording and path is not None:
            _note_dictionary(tracer, module, path)
        if name in MACHINERY or name.startswith(_INTERNAL_PREFIX) or not tracer.is_recording or path is None:
            if name in MACHINERY and path is not None:
                _note_machinery(tracer, sys._getframe(1).f_code, name, module is root)
            return look_up(module, name)
        # before the lookup, since tensors and submodules raise AttributeError here and are found by __getattr__
        if module is root:
            tracer.session.reads.add(name)
        try:
            value = look_up(module, name)
        except AttributeError:
            if name in module.__dict__.get(OF_CLASS, ()):
                return _noted(tracer, module, name, join(path, name), module.__getattr__(name))
            parameter = module._parameters.get(name)
            if parameter is not None:
                tracer.session.looked_up = parameter, join(path, name)
            # a parameter, buffer or submodule may be None
            if all(held.get(name) is None for held in (module._parameters, module._buffers, module._modules)):
                tracer.session.read_once.setdefault(join(path, name), ABSENT)
            raise
        return _noted(tracer, module, name, join(path, name), value)

    return note


def _note_machinery(tracer: Recorder, code: CodeType, name: str, is_root: bool) -> None:
    """Notes that code reads what every module has; other modules can't share the recording then."""
    if name == "training" and is_root:
        return  # each mode has a graph
    if code.co_filename == _MODULE_FILE or guards.is_machinery(code.co_filename):
        return
    tracer.session.specialised |= is_root or name not in _LISTS
    if tracer.is_recording and "param" in name:
        _refuse_to_compare(tracer, code)


def _refuse_to_compare(tracer: Recorder, code: CodeType) -> None:
    """Raises TraceError if code that lists a module's parameters compares objects by `is`."""
    if compares_objects(code):
        message = (
            f"{guards.deciding_line()} compares one of all parameters with others by `is`, to which a traced value is "
            "another object; compare their names, or ask for the attribute of the module"
        )
        raise tracer.failing(TraceError(message))


def _noted(tracer: Recorder, module: nn.Module, name: str, path: str, value: Any) -> Any:
    """Records a read of an attribute, and returns the value or the proxy that the reading code gets."""
    is_own = name in module.__dict__
    is_of_class = name in module.__dict__.get(OF_CLASS, ()) or _is_of_class(type(module), name, value)
    if is_plain(value) and (is_own or is_of_class):
        # a value that the forward itself has set belongs to this run
        recording = tracer.session.recording
        if is_own and recording is not None and not recording.before.has(module, name, value):
            return value
        if path not in tracer.session.lines_of_reads:
            tracer.session.lines_of_reads[path] = guards.deciding_line()
        return plain_or_proxy(tracer, module, path, value)
    if (
        (is_own or is_of_class)
        and path not in tracer.session.read_once
        and not guards.is_machinery(sys._getframe(2).f_code.co_filename)
    ):
        _refuse_iterator(tracer, module, name, value)
        tracer.session.read_once[path] = value
    return value


def _refuse_iterator(tracer: Recorder, module: nn.Module, name: str, value: Any) -> None:
    recording = tracer.session.recording
    # an iterator that the forward itself has set is new in each run
    if holds_iterator(value) and recording is not None and recording.before.has(module, name, value):
        raise tracer.failing(draws_error(f"self.{name}"))


def _note_dictionary(tracer: Recorder, module: nn.Module, path: str) -> None:
    file = sys._getframe(2).f_code.co_filename
    if not guards.is_machinery(file) and not file.startswith(_PYTORCH):
        for name, value in (attributes_of(module) or {}).items():
            _refuse_iterator(tracer, module, name, value)
        tracer.session.read_once.setdefault(join(path, "__dict__"), {})


_PYTORCH = os.path.dirname(torch.__file__)
_MODULE_FILE = inspect.getfile(nn.Module)


def is_plain(value: Any) -> bool:
    """Returns whether `value` is immutable and simple: a number, a string, None, an enum or a tuple of plain values."""
    kind = type(value)  # isinstance would read __class__, which user objects can override
    if kind in (tuple, torch.Size):
        return all(map(is_plain, value))
    return kind in SIMPLE or issubclass(kind, enum.Enum)


def _is_of_class(cls: type, name: str, value: Any) -> bool:
    return any(vars(base)[name] is value for base in cls.__mro__ if name in vars(base))


def plain_or_proxy(tracer: Recorder, module: nn.Module, path: str, value: Any) -> Any:
    """Returns a proxy for a number, unless the module's code compares with True by ``is``; else the value itself."""
    proxy = tracer.attribute(path)
    if not isinstance(proxy, fx.Proxy):
        return proxy  # the tracer returns None and strings as plain values
    if type(value) not in _NUMBERS or uses_is_true(in_place.original_class(module)):
        tracer.decide(proxy, value)
        return value
    return proxy
