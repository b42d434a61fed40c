"""Records a forward, repeatedly if necessary, until the graph is correct.

A forward is recorded again if a recording shows that a submodule must stay a call, if it changes state (see
`side_effects`), and once with and once without gradients if its code asks for the gradient mode.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft.code.namespaces import Attribute
from graphpeft.graph import guards
from graphpeft.graph.errors import OUT_OF_MEMORY, DrawsNumbersError, TraceError
from graphpeft.graph.paths import join
from graphpeft.tracing import patches
from graphpeft.tracing.graph_equality import checks_all_of, equivalent
from graphpeft.tracing.linting import lint
from graphpeft.tracing.random_numbers import no_random_python_numbers
from graphpeft.tracing.session import RecordAgain
from graphpeft.tracing.side_effects import stateful_modules
from graphpeft.tracing.tracer import ValueTracer
from graphpeft.tracing.type_checks import refuse_type_checks

ONE_TRACE_AT_A_TIME = threading.RLock()
"""Allows one trace at a time, since a trace patches global state of the process."""

if hasattr(os, "register_at_fork"):
    # a process forked during a trace would keep the patches, without the thread that undoes them
    os.register_at_fork(
        before=ONE_TRACE_AT_A_TIME.acquire,
        after_in_parent=ONE_TRACE_AT_A_TIME.release,
        after_in_child=ONE_TRACE_AT_A_TIME.release,
    )


def record_forward(
    tracer: ValueTracer,
    root: nn.Module,
    entry: Callable[..., Any],
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any],
    modes: Mapping[nn.Module, bool] | None = None,
) -> fx.Graph:
    """Records a call of `root`, without changing `root`."""
    refuse_type_checks(root)
    session = tracer.session
    session.begin(root, modes or {})
    kept = dict(session.kept)
    with ONE_TRACE_AT_A_TIME, tracer.tracing(entry, (args, kwargs) if args is not None else None):
        try:
            graph = _recorded_until_correct(tracer)
            if decides_on_gradients(graph):
                graph = _for_both_gradient_modes(tracer, graph)
            lint(graph, session.constants.values)
            return graph
        except (TraceError, *OUT_OF_MEMORY):
            session.kept = kept  # no graph calls the modules that this trace kept
            raise
        except Exception as error:
            session.kept = kept
            if args is None:
                raise tracer.undecided(error) from error
            line = guards.failing_line(error)
            message = f"{type(root).__name__}'s forward fails at {line} while it is traced"
            raise TraceError(f"{message}: {type(error).__name__}: {error}") from error


def _recorded_until_correct(tracer: ValueTracer) -> fx.Graph:
    # a copied context discards what the forward sets in context variables
    while (graph := contextvars.copy_context().run(_recorded, tracer)) is None:
        pass  # each recording finds further modules that must stay calls, so this ends
    return graph


def _for_both_gradient_modes(tracer: ValueTracer, graph: fx.Graph) -> fx.Graph:
    """Returns one graph for runs with and without gradients, if both compute the same; else `graph`."""
    session = tracer.session
    kept, not_kept = dict(session.kept), dict(session.not_kept)
    session.gradients = not session.gradients
    try:
        serving = serving_both(graph, _recorded_until_correct(tracer))
    except OUT_OF_MEMORY:
        raise
    except Exception:
        serving = None  # `graph` has a check, which raises in the other mode
    if serving is None:
        session.kept, session.not_kept = kept, not_kept
    return serving or graph


def _recorded(tracer: ValueTracer) -> fx.Graph | None:
    """Records the root once; returns None if it must be recorded again, with further modules as calls."""
    session, root = tracer.session, tracer.session.root
    tracer.begin()
    kept = dict(session.kept)
    try:
        with torch.enable_grad(), patches.recording(tracer, root) as recording, no_random_python_numbers():
            session.recording = recording
            recording.refuse_iterators(root)
            graph = tracer.trace(root)
            with tracer.examples.real_calls(makes_tensors=False):
                changed = recording.before.changed()
            stateful = _stateful_modules(tracer, graph, changed) if changed else {}
    except RecordAgain:
        session.kept = kept
        return None
    except DrawsNumbersError:
        if session.watches_draws:
            raise
        # record again and watch each module, which is slow, so that only the modules that draw stay calls
        session.watches_draws, session.kept = True, kept
        return None
    finally:
        session.recording = None
    session.stateful |= stateful
    if stateful:
        return None
    paths = {module: path for path, module in root.named_modules()}
    for attribute in changed:
        owner = recording.before.owners(attribute)[0]
        is_own = attribute.namespace.of is owner
        name = join(paths[owner], attribute.name) if is_own else attribute.described(owner)
        session.not_kept[name] = None
    return graph


def _stateful_modules(tracer: ValueTracer, graph: fx.Graph, changed: list[Attribute]) -> dict[str, str]:
    def record_again() -> fx.Graph:
        tracer.begin()
        tracer.session.left = {}
        return tracer.trace(tracer.session.root)

    return stateful_modules(tracer, record_again, tracer.session.root, graph, changed)


def decides_on_gradients(graph: fx.Graph) -> bool:
    """Returns whether `graph` asks ``torch.is_grad_enabled()``."""
    return any(map(_is_question, graph.nodes))


def serving_both(graph: fx.Graph, other: fx.Graph) -> fx.Graph | None:
    """Returns one graph for runs with and without gradients, or None if the two graphs compute different results.

    The returned graph is the input graph that has all checks of the other, less the checks of the gradient mode.
    """
    if not equivalent(graph, other, {}) or not equivalent(other, graph, {}):
        return None
    for one, another in ((graph, other), (other, graph)):
        if checks_all_of(one, another, _is_about_gradients):
            for node in reversed(one.nodes):
                if _is_question(node) or _is_about_gradients(node):
                    one.erase_node(node)
            return one
    return None


def _is_question(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.is_grad_enabled


def _is_about_gradients(node: fx.Node) -> bool:
    return node.target is guards.expect and any(map(_is_question, node.all_input_nodes))
