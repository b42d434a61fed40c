"""Traces the forward of one module, with its submodules as calls, and shares the graph among equal modules.

Tracing and compiling a module takes milliseconds, and a model has hundreds of equal modules. A lifted template is
stored with the facts that the trace read from its module (attributes, which tensors exist, the classes of submodules).
Other modules of the class with the same facts would give the same graph, so they share the template, and a module whose
facts are as they were isn't recorded again.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import re
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphpeft._torch import OpOverload, OpOverloadPacket
from graphpeft.code.contents import has_content
from graphpeft.code.identity_checks import forward_compares_objects
from graphpeft.code.reach import is_of_a_library
from graphpeft.code.source import functions_in_forward, names_in
from graphpeft.graph import in_place
from graphpeft.graph.computed_weights import read_as_attributes
from graphpeft.graph.copied_graphs import copy_graph
from graphpeft.graph.errors import NeedsInputsError, TraceError
from graphpeft.graph.forward_classes import class_of_forward
from graphpeft.graph.holders import own_modules
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.kept_forwards import set_forward
from graphpeft.graph.offloading import unhooked
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.replaceable import refuse_what_a_graph_cannot_replace
from graphpeft.graph.settings import add_check
from graphpeft.graph.template import SIMPLE, Template, template_of
from graphpeft.tracing.constant_attributes import make_settings
from graphpeft.tracing.globals_read import Weak, globals_read, imports_code_of_a_user
from graphpeft.tracing.modes import in_each_mode
from graphpeft.tracing.record import ONE_TRACE_AT_A_TIME, record_forward
from graphpeft.tracing.tracer import ValueTracer
from graphpeft.transaction import at_end_of

Facts = tuple[tuple[str, Any], ...]
"""What a trace read, by path: an attribute of a module; or a submodule, with "" for the module itself."""


class Lifted(NamedTuple):
    """A template and the facts that it depends on.

    Attributes:
        forward: The traced function.
        named: The facts of what the forward and its functions read beside the module and their arguments: globals,
            closure variables, attributes of classes, defaults. They are equal if values are, and objects without state
            are the same ones.
        facts: What the trace read from the module.
        template: The template.
    """

    forward: Callable[..., Any]
    named: list[tuple[str, Any]]
    facts: Facts
    template: Template

    def holds_for(self, module: nn.Module) -> bool:
        """Returns whether a trace of `module` would give the same graph."""
        forward = type(module).forward
        if self.forward is not forward or self.named != _named_by(type(module)):
            return False
        return all(_observe_at(module, path) == seen for path, seen in self.facts)


_LIFTED: weakref.WeakKeyDictionary[type, list[Lifted]] = weakref.WeakKeyDictionary()
_MOST_LIFTED = 64
"""The number of most recently used templates stored for a class."""


def lift(module: nn.Module, example_inputs: ExampleInputs | None = None) -> Template:
    """Returns the template of `module`'s own forward, without changing `module`.

    The graph reads tensors of `module`, and numbers in tensor arithmetic, in each run. Other plain attributes are
    constants of the graph, which checks them in each run.

    Args:
        module: Any module. If it has a template, or is an ``fx.GraphModule``, its graph is reused.
        example_inputs: Inputs of this module, needed for a forward that decides on its inputs.

    Raises:
        TraceError: If no graph can represent the forward.
    """
    worn = template_of(module)
    if worn is not None:
        return worn
    if isinstance(module, fx.GraphModule):
        return Template((copy_graph(module.graph),), shared=False)
    refuse_what_a_graph_cannot_replace(module)
    cls = in_place.original_class(module)
    is_set = set_forward(module) is not None
    known = _LIFTED.get(cls, []) if example_inputs is None and not is_set else []
    found = next((lifted for lifted in known if lifted.holds_for(module)), None)
    if found is None:
        with ONE_TRACE_AT_A_TIME, unhooked(module), in_place.without(module, "tensors"):
            template, facts = _record(module, example_inputs)
        if facts is None or is_set:
            return template
        found = Lifted(type(module).forward, _named_by(type(module)), facts, template)
    if not known or found is not known[0]:
        _LIFTED[cls] = [found, *(lifted for lifted in known if lifted is not found)][:_MOST_LIFTED]
    return found.template


def lift_forward(module: nn.Module, forward: Callable[..., Any]) -> Template:
    """Returns the template of a function that computes with `module`, as a forward of it; shared with no other module.

    Raises:
        TraceError: As `lift` does.
    """
    with ONE_TRACE_AT_A_TIME, unhooked(module), in_place.without(module, "tensors"), contextlib.ExitStack() as stack:
        at_end_of(stack, _put_back, vars(module), "forward", vars(module).get("forward", _UNKNOWN))
        vars(module)["forward"] = forward
        return _record(module, None)[0]


def _put_back(held: dict[str, Any], name: str, value: Any) -> None:
    if value is _UNKNOWN:
        held.pop(name, None)
    else:
        held[name] = value


def _record(module: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Template, Facts | None]:
    tracer = ValueTracer(keeps_whole=lambda _: True)
    cls = class_of_forward(module)
    # which no proxy can answer
    if example_inputs is None and forward_compares_objects(cls):
        raise NeedsInputsError(
            f"{cls.__name__}'s forward asks whether values are the same object; pass example_inputs: a tuple of "
            "positional arguments or a dict of keyword arguments of the model"
        )
    recorded = in_each_mode(
        module, lambda modes: record_forward(tracer, module, module.forward, *split_inputs(example_inputs), modes)
    )
    if recorded.other_mode_error is not None:
        raise recorded.other_mode_error
    for name, value in tracer.session.constants.values.items():
        raise TraceError(f"it uses a {type(value).__name__} ({name}) that isn't an attribute of the module")
    for graph in recorded.graphs:
        read_as_attributes(graph, module)
        add_check(graph, make_settings(graph, tracer.session.lines_of_reads))
    template = Template(recorded.graphs, shared=True)
    if (
        tracer.session.specialised
        or example_inputs is not None
        or any(seen is _UNKNOWN for _, seen in _named_by(type(module)))
    ):
        return template, None
    if any(_reads_all(function) for function in functions_in_forward(type(module))):
        return template, None
    if any(_has_operators(type(inner)) for inner in modules_by_path(module).values() if inner is not module):
        return template, None
    session = tracer.session
    read = sorted({*session.reads, *session.lines_of_reads, *session.read_once, ""})
    facts = tuple((path, _observe_at(module, path)) for path in read)
    return template, facts if all(seen is not _UNKNOWN for _, seen in facts) else None


def _reads_all(forward: types.FunctionType) -> bool:
    """Returns whether a function reads what isn't observed: more than some attributes, or settings of the process."""
    code = forward.__code__
    return not _READ_MORE.isdisjoint(names_in(code).read) or imports_code_of_a_user(code)


_READ_MORE = frozenset(
    (
        *("__dict__", "vars", "dir", "id", "globals"),
        *("environ", "getenv", "argv", "flags", "backends", "get_default_dtype", "get_default_device"),
        *("get_num_threads", "get_num_interop_threads", "get_float32_matmul_precision", "is_anomaly_enabled"),
        *("are_deterministic_algorithms_enabled", "is_deterministic_algorithms_warn_only_enabled"),
    )
)
"""Names by which code reads any attribute, tells modules apart, or asks for settings of the process or of PyTorch."""


def _has_operators(cls: type) -> bool:
    """Returns whether a layer's class says how to be called, indexed and the like, which no read of a name shows."""
    members = (
        member for base in cls.__mro__ if not base.__module__.startswith("torch.") for member in vars(base).items()
    )
    functions = {name for name, member in members if type(member) is types.FunctionType}
    return any(name.startswith("__") for name in functions - _NO_OPERATORS)


_NO_OPERATORS = frozenset(("__init__", "__repr__", "__getstate__", "__setstate__", "__deepcopy__", "__reduce_ex__"))


def _named_by(cls: type) -> list[tuple[str, Any]]:
    """Returns the facts of what a forward reads beside its module."""
    return [(name, _observe_global(value)) for name, value in globals_read(cls)]


def _observe_global(value: Any) -> Any:
    if type(value) is Weak:
        return value
    return _Itself(value) if _is_stateless(value) else _observe_value(value)


def _is_stateless(value: Any) -> bool:
    """Returns whether a library's object computes the same as long as it is the same one."""
    kind = type(value)
    if kind is types.BuiltinFunctionType:  # or a method of a dictionary, say
        return value.__self__ is None or issubclass(type(value.__self__), type | types.ModuleType)
    if issubclass(kind, types.ModuleType):
        return is_of_a_library(value.__name__)
    if str(kind.__module__).partition(".")[0] in ("numpy", "typing"):
        return not has_content(value)
    return kind is object or issubclass(kind, _STATELESS)


_STATELESS = (
    *(bytes, slice, range, types.EllipsisType, types.GenericAlias, types.UnionType, re.Pattern, logging.Logger),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    *(types.MemberDescriptorType, types.GetSetDescriptorType),
    *(torch.layout, torch.memory_format, torch.finfo, torch.iinfo),
    *(torch.jit.ScriptFunction, OpOverload, OpOverloadPacket),
)
"""Types of libraries whose objects have no state."""


class _Itself:
    """The observation of an object of a library, which is a fact as long as it is the same one."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value


_ABSENT = object()
"""The observation of an attribute that isn't there."""

_UNKNOWN = object()
"""The observation of an object that can change and remain the same object, so it is no fact."""


def _observe_at(module: nn.Module, path: str) -> Any:
    """Returns the fact that a trace can depend on when it reads a path; "" is the tree of all submodules."""
    if not path:
        return _observe_tree(module)
    *around, name = path.split(".")
    for outer in around:
        inner = module._modules.get(outer)
        if inner is None:
            return _UNKNOWN
        module = inner
    return _observe(module, name)


def _observe_tree(module: nn.Module) -> Any:
    """Returns the classes of a module's submodules, which stay calls, and the names of their tensors, by all paths."""
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
        found.append((path, path and in_place.original_class(inner), tensors))
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
    return static if static is _ABSENT or callable(static) or isinstance(static, property) else _observe_value(static)


def _observe_value(value: Any, inside: int = 0) -> Any:
    # not isinstance, which would read `__class__`, and so run code of somebody's object
    kind = type(value)
    if kind in SIMPLE or issubclass(kind, enum.Enum):
        # by the text of a number, since 0.0 equals -0.0, and no NaN equals itself
        return kind, repr(value) if kind in (float, complex) else value
    # a container may hold itself, or a million numbers
    if kind not in (tuple, list, dict, torch.Size) or inside > _DEEPEST or len(value) > _LONGEST:
        return _UNKNOWN
    held = tuple(value.items()) if kind is dict else value
    parts = tuple([_observe_value(part, inside + 1) for part in held])
    return _UNKNOWN if _UNKNOWN in parts else (kind, parts)


_DEEPEST, _LONGEST = 4, 1000
"""How deep containers are observed in each other, and how long they may be."""
