"""Records the forward of one module, with its submodules as calls, and shares the result among equal modules.

Tracing and compiling a module takes milliseconds, and a model has hundreds of equal ones. A lifted template is kept
with the facts that the trace read from its instance: another instance of the class for which the same facts hold (the
same plain attributes, the same tensors present) would be traced into the same graph, so it wears the same template.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft.tracing import guards
from graphpeft.tracing.errors import TraceError
from graphpeft.tracing.graph_module import Template, copy_graph, template_of
from graphpeft.tracing.trace import ExampleInputs, split_inputs
from graphpeft.tracing.tracer import SIMPLE, ValueTracer

Facts = tuple[tuple[str, Any], ...]

_TEMPLATES: weakref.WeakKeyDictionary[type, list[tuple[Facts, Template]]] = weakref.WeakKeyDictionary()
_MACHINERY = frozenset(dir(nn.Module()))
"""What every module has; of these a graph depends on `training` alone, which stays one of its inputs."""


def lift(module: nn.Module, example_inputs: ExampleInputs | None = None) -> Template:
    """Returns the template of `module`'s own forward; `module` itself stays as it is.

    Args:
        module: Any module. One that wears a template, or is an ``fx.GraphModule``, has its graph already.
        example_inputs: Inputs of this module, for a forward that decides on them.

    Raises:
        TraceError: If the forward can't be recorded truthfully.
    """
    worn = template_of(module)
    if worn is not None:
        return worn
    if isinstance(module, fx.GraphModule):
        return Template(copy_graph(module.graph), shared=False)
    if "forward" in module.__dict__:
        raise TraceError(
            f"its forward was set on the instance ({module.__dict__['forward']!r}) and would win over the graph's; "
            "adapt the model before hooks replace its forwards"
        )
    known = _TEMPLATES.setdefault(type(module), [])
    for facts, template in known:
        if all(_observe(module, name) == seen for name, seen in facts):
            return template
    template, facts = _record(module, example_inputs)
    if facts is not None:
        known.append((facts, template))
    return template


def _record(module: nn.Module, example_inputs: ExampleInputs | None) -> tuple[Template, Facts | None]:
    tracer = ValueTracer(keeps_whole=lambda _: True)
    with _noting_reads(module) as reads:
        graph = tracer.trace_module(module, *split_inputs(example_inputs))
    _refuse_decisions_on_training(graph)
    for name, value in tracer.constants.items():
        raise TraceError(f"it uses a {type(value).__name__} ({name}) that isn't an attribute of the module")
    facts = tuple((name, _observe(module, name)) for name in sorted(reads))
    shareable = not tracer.specialised and example_inputs is None and all(seen is not _UNKNOWN for _, seen in facts)
    return Template(graph, shared=True), facts if shareable else None


def _refuse_decisions_on_training(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is guards.expect and any(
            source.op == "get_attr" and str(source.target).split(".")[-1] == "training"
            for source in (node.args[0], *node.args[0].all_input_nodes)
        ):
            raise TraceError(f"it takes another way in training than in evaluation: {node.args[2]}")


@contextlib.contextmanager
def _noting_reads(module: nn.Module) -> Iterator[set[str]]:
    """Notes the names of the attributes that are read from `module`."""
    reads: set[str] = set()
    cls = type(module)

    def note(self: nn.Module, name: str) -> Any:
        if self is module and name not in _MACHINERY and not name.startswith("__"):
            reads.add(name)
        return cls.__getattribute__(self, name)

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": note, "__module__": cls.__module__})
    try:
        yield reads
    finally:
        module.__class__ = cls


_UNKNOWN = object()
"""Seen on an attribute that can change without becoming another object, so that nothing follows from it."""


def _observe(module: nn.Module, name: str) -> Any:
    """Returns what a trace can depend on when it reads the attribute `name`."""
    for kind in ("_parameters", "_buffers"):
        tensors = module.__dict__[kind]
        if name in tensors:
            return kind if tensors[name] is not None else None
    if name in module.__dict__["_modules"]:
        return "module", type(module.__dict__["_modules"][name])
    if name not in module.__dict__:
        return "of the class"
    return _observe_value(module.__dict__[name])


def _observe_value(value: Any) -> Any:
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        parts = tuple(_observe_value(part) for part in value)
        return _UNKNOWN if _UNKNOWN in parts else parts
    return _UNKNOWN
