"""Records the forward of one module, with its submodules as calls, and shares the graph among equal modules of a call.

Recording and compiling a module takes milliseconds, and a model has hundreds of equal modules. A recording is kept with
the facts that it read from its module (attributes, which tensors exist, the classes of submodules). Other modules of
the class with the same facts would give the same graph, so they share it. It isn't kept longer than the call, since a
forward may read whatever else by then: globals, settings, code that was replaced.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphpeft.code.identity_checks import forward_compares_objects
from graphpeft.code.source import (
    cached_by_class,
    functions_in_forward,
    is_of_pytorch,
    is_table_of_modules,
    names_in,
    reached_in_forward,
)
from graphpeft.graph import in_place
from graphpeft.graph.computed_weights import read_as_attributes
from graphpeft.graph.copied_graphs import copy_graph
from graphpeft.graph.errors import NeedsInputsError, TraceError
from graphpeft.graph.holders import own_modules
from graphpeft.graph.hosts.accelerate import unhooked
from graphpeft.graph.hosts.patched_code import class_of_forward
from graphpeft.graph.hosts.patched_forwards import patched_forward
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.own_tensors import recording_reads
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.replaceable import refuse_what_a_graph_cannot_replace
from graphpeft.graph.settings import add_check
from graphpeft.graph.template import SIMPLE, Template, template_of
from graphpeft.tracing.constant_attributes import make_settings, settings_in_objects
from graphpeft.tracing.modes import in_each_mode
from graphpeft.tracing.record import ONE_TRACE_AT_A_TIME, record_forward
from graphpeft.tracing.tracer import ValueTracer
from graphpeft.transaction import at_end_of

Facts = tuple[tuple[str, Any], ...]
"""The reads of a trace, by path: an attribute of a module; or a submodule, with "" for the module itself."""


class Recording(NamedTuple):
    """The result of a recording, and the facts that it depends on.

    Attributes:
        facts: The reads of the recording from its module.
        result: The template, or why there is none.
    """

    facts: Facts
    result: Template | TraceError

    def holds_for(self, module: nn.Module) -> bool:
        """Returns whether a recording of `module` would give the same graph."""
        return all(_observe_at(module, path) == seen for path, seen in self.facts)


class Recordings:
    """The recordings of one call, which equal modules share."""

    def __init__(self) -> None:
        self._by_forward: dict[tuple[type, Callable[..., Any]], list[Recording]] = {}

    def lift(self, module: nn.Module, example_inputs: ExampleInputs | None = None) -> Template:
        """Returns the template of `module`'s own forward, without changing `module`.

        The graph reads tensors of `module`, and numbers in tensor arithmetic, in each run. Other plain attributes are
        constants of the graph, which checks them in each run.
        """
        worn = template_of(module)
        if worn is not None:
            return worn
        if isinstance(module, fx.GraphModule):
            return Template((copy_graph(module.graph),), shared=False)
        refuse_what_a_graph_cannot_replace(module)
        is_set = patched_forward(module) is not None
        known = self._by_forward.setdefault((in_place.original_class(module), type(module).forward), [])
        found = None
        if example_inputs is None and not is_set:
            found = next((recording for recording in known if recording.holds_for(module)), None)
        if found is None:
            with ONE_TRACE_AT_A_TIME, unhooked(module), in_place.without(module, "tensors"):
                found, is_shared = _record(module, example_inputs)
            if is_shared and not is_set:
                # the last ones alone, since hundreds of modules may differ from each other
                known[_MOST_SHARED - 1 :] = []
                known.insert(0, found)
        if isinstance(found.result, TraceError):
            raise found.result
        return found.result


_MOST_SHARED = 64
"""The number of the last recordings of a class among which one for another module is looked for."""


def lift_forward(module: nn.Module, forward: Callable[..., Any]) -> Template:
    """Returns the template of a function that computes with `module`, as a forward of it; no other module shares it."""
    with ONE_TRACE_AT_A_TIME, unhooked(module), in_place.without(module, "tensors"), contextlib.ExitStack() as stack:
        at_end_of(stack, _put_back, vars(module), "forward", vars(module).get("forward", _ABSENT))
        vars(module)["forward"] = forward
        return _template(ValueTracer(keeps_whole=lambda _: True), module, None)


def _put_back(held: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        held.pop(name, None)
    else:
        held[name] = value


def _record(module: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Recording, bool]:
    """Records a module, and returns the recording and whether modules with the same facts may share it."""
    tracer = ValueTracer(keeps_whole=lambda _: True)
    result: Template | TraceError
    try:
        result = _template(tracer, module, example_inputs)
    except TraceError as error:
        result = error
    session = tracer.session
    read = sorted({*session.reads, *session.lines_of_reads, *session.read_once, ""})
    facts = tuple((path, _observe_at(module, path)) for path in read)
    may_lack_facts = session.specialised or _reads_more(module)
    return Recording(facts, result), example_inputs is None and not may_lack_facts


def _template(tracer: ValueTracer, module: nn.Module, example_inputs: ExampleInputs | None) -> Template:
    cls = class_of_forward(module)
    # which no proxy can answer
    if example_inputs is None and forward_compares_objects(cls):
        raise NeedsInputsError(
            f"{cls.__name__}'s forward asks whether values are the same object; pass example_inputs: a tuple of "
            "positional arguments or a dict of keyword arguments of the model"
        )
    with recording_reads():
        recorded = in_each_mode(
            module, lambda modes: record_forward(tracer, module, module.forward, *split_inputs(example_inputs), modes)
        )
    if recorded.other_mode_error is not None:
        raise recorded.other_mode_error
    for name, value in tracer.session.constants.values.items():
        raise TraceError(f"it uses a {type(value).__name__} ({name}) that isn't an attribute of the module")
    held = settings_in_objects(module, tracer.session.read_once)
    for graph in recorded.graphs:
        read_as_attributes(graph, module)
        reads = make_settings(graph, tracer.session.lines_of_reads)
        add_check(graph, reads._replace(settings=(*reads.settings, *held)))
    return Template(recorded.graphs, shared=True)


def _reads_more(module: nn.Module) -> bool:
    """Returns whether code of a module or its layers may depend on more than attributes that are read by name."""
    classes = set(map(in_place.original_class, modules_by_path(module).values()))
    return any(map(_class_reads_more, classes))


@cached_by_class
def _class_reads_more(cls: type) -> bool:
    members = [item for base in cls.__mro__ if not is_of_pytorch(base) for item in vars(base).items()]
    if not _RUN_FOR_NAMES.isdisjoint(name for name, _ in members) or reached_in_forward(cls).has_tables:
        return True
    own = (getattr(member, "fget", member) for name, member in members if name not in _RUN_BY_OTHERS)
    functions = (*functions_in_forward(cls), *(member for member in own if type(member) is types.FunctionType))
    return any(not _READ_MORE.isdisjoint(names_in(function.__code__).read) for function in functions)


_RUN_FOR_NAMES = frozenset(("__getattr__", "__getattribute__"))
_RUN_BY_OTHERS = ("__init__", "__repr__", "__getstate__", "__setstate__", "__deepcopy__", "__reduce_ex__", "extra_repr")
"""Methods that no forward runs."""

_READ_MORE = frozenset(("__getattribute__", "dir", "hash", "id"))
"""Names by which code reads an attribute unseen, reads the names of all, or tells modules apart."""


class _Itself:
    """The observation of an object, which in a call is in the same state for all modules that hold it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value


_ABSENT = object()
"""The observation of an attribute that isn't there."""


class _Unknown:
    """The observation of a value that lies behind another object than a module, or may tell modules apart."""


def _observe_at(module: nn.Module, path: str) -> Any:
    """Returns the fact that a trace can depend on when it reads a path; "" is the tree of all submodules."""
    if not path:
        return _observe_tree(module)
    *around, name = path.split(".")
    for outer in around:
        inner = module._modules.get(outer)
        if inner is None:
            return _Unknown()
        module = inner
    return _observe(module, name)


def _observe_tree(module: nn.Module) -> Any:
    """Returns a module's submodules, which stay calls: their classes, tensors' names, and patched forwards."""
    found: list[Any] = []
    first, waiting = dict[nn.Module, str](), [("", module)]
    while waiting:
        path, inner = waiting.pop()
        if inner in first:
            found.append((path, first[inner]))
            continue
        first[inner] = path
        held = (*inner._parameters.items(), *inner._buffers.items(), *vars(inner).items())
        tensors = tuple([name for name, tensor in held if issubclass(type(tensor), torch.Tensor)])
        found.append((path, path and in_place.original_class(inner), tensors, "forward" in vars(inner)))
        for name, child in own_modules(inner):
            if child is None:
                found.append((join(path, name), None))
            else:
                waiting.append((join(path, name), child))
    return tuple(found)


def _observe(module: nn.Module, name: str) -> Any:
    """Returns the fact that a trace can depend on when it reads the attribute `name`."""
    for kind in ("_parameters", "_buffers"):
        tensors = module.__dict__[kind]
        if name in tensors:
            if tensors[name] is None:
                return None
            # the first name of a tensor that has several
            return next((kind, other) for other, tensor in tensors.items() if tensor is tensors[name])
    if name in module.__dict__:
        return _observe_value(module.__dict__[name])
    if module._modules.get(name, module) is None:
        return None
    static = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), _ABSENT)
    if static is _ABSENT:
        return static
    is_for_each = hasattr(type(static), "__get__") and not issubclass(type(static), _SAME_FOR_ALL)
    return _Unknown() if is_for_each else _observe_value(static)


_SAME_FOR_ALL = (types.FunctionType, property, functools.cached_property, staticmethod, classmethod)
"""Descriptors that keep nothing for a module but by its attributes."""


def _observe_value(value: Any, inside: int = 0) -> Any:
    # not isinstance, which would read `__class__`, and so run code of somebody's object
    kind = type(value)
    if kind in SIMPLE:
        # by the text of a number, since 0.0 equals -0.0, and no NaN equals itself
        return kind, repr(value) if kind in (float, complex) else value
    if issubclass(kind, nn.Module | weakref.ref) or is_table_of_modules(value):
        return _Unknown()  # code may ask whether it is, or has, the module itself
    # a container may hold itself, or a million numbers
    if kind not in (tuple, list, dict, torch.Size) or inside > _DEEPEST or len(value) > _LONGEST:
        return _Itself(value)
    held = tuple(value.items()) if kind is dict else value
    return kind, tuple([_observe_value(part, inside + 1) for part in held])


_DEEPEST, _LONGEST = 4, 1000
"""How deep containers are observed in each other, and how long they may be."""
