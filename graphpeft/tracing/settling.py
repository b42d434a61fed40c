"""Which modules a graph can't hold, for what they leave for their next call.

A graph holds no state beside tensors that it writes in place. So a forward that assigns ``self.pooled = …``, fills a
dictionary or counts in a global becomes a graph only where that makes no difference:

- what it sets before it reads it is of no use to the next call;
- a cache of what follows from sizes and parameters alone can be computed anew in each run.

Which it is shows when the forward is recorded a second time, from the state in which the first time left all that it
can reach: the state must not change any further, and what the second graph reads of it must not come from the inputs'
values. Nor may such a value be left outside of the modules, where others look for it, as for what a hook has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn

from graphpeft.code.namespaces import Attribute
from graphpeft.graph import guards
from graphpeft.graph.errors import OUT_OF_MEMORY, TraceError
from graphpeft.graph.facts import above, above_with_writes, is_trained, varies
from graphpeft.graph.template import VALUE
from graphpeft.tracing import left as left_values
from graphpeft.tracing.recorder import Recorder
from graphpeft.tracing.sameness import computes_the_same


class Repetition(NamedTuple):
    """A second recording.

    Attributes:
        graph: Its graph, or None if it failed.
        error: Why it failed, for a person to read.
        values: What it left in the attributes that either recording changed.
        of_the_state: The nodes that stand for what the first one had left, with the nodes of that.
    """

    graph: fx.Graph | None
    error: str
    values: dict[Attribute, Any]
    of_the_state: dict[fx.Node, fx.Node]


def changing_modules(
    tracer: Recorder,
    record_again: Callable[[], fx.Graph],
    root: nn.Module,
    graph: fx.Graph,
    changed: list[Attribute],
) -> dict[str, str]:
    """Returns the paths of the modules that have to stay calls, with the reason.

    Args:
        tracer: The tracer, which has just recorded `root`.
        record_again: Records it a second time.
        root: The module, in the state in which the recording left it.
        graph: What was recorded.
        changed: The attributes that have another value now.

    Raises:
        TraceError: If that is the root itself.
    """
    with tracer.examples.real_calls(makes_tensors=False):
        left = {attribute: left_values.value_of(attribute) for attribute in changed}
    assert tracer.session.recording is not None
    before = tracer.session.recording.before
    writers, called = tracer.session.assigners, tracer.session.called
    again = _recorded_again(tracer, record_again, changed)
    paths = {module: path for path, module in root.named_modules()}
    found: dict[str, str] = {}
    with tracer.examples.real_calls(makes_tensors=False):
        unsettled = _unsettled(graph, left, again)
    for attribute in unsettled:
        does = "assigns" if attribute in writers else "changes"
        for module in _inlined(before.owners(attribute), paths, called):
            what = f"{does} {attribute.described(module)} for its next call"
            reason = f"{type(module).__name__}'s forward {what}, which a graph can't hold{again.error}"
            path = _around(called, [paths[module], *writers.get(attribute, ())])
            if not path:
                raise TraceError(reason)
            found.setdefault(path, reason)
    return found


def _inlined(owners: list[nn.Module], paths: Mapping[nn.Module, str], called: Collection[str]) -> list[nn.Module]:
    """Returns those of the modules that share some state whose code is in the graph; each of them must leave it."""
    return [module for module in owners if not paths[module] or paths[module] in called] or owners[:1]


def _recorded_again(tracer: Recorder, record_again: Callable[[], fx.Graph], changed: list[Attribute]) -> Repetition:
    assert tracer.session.recording is not None
    kept = dict(tracer.session.kept)
    graph, error = None, ""
    try:
        graph = record_again()
    except OUT_OF_MEMORY:
        raise
    except Exception as failure:
        error = f" ({failure})"
    tracer.session.kept = kept
    with tracer.examples.real_calls(makes_tensors=False):
        attributes = dict.fromkeys([*changed, *tracer.session.recording.before.changed()])
        values = {attribute: left_values.value_of(attribute) for attribute in attributes}
    return Repetition(graph, error, values, {stand_in: node for node, stand_in in (tracer.session.left or {}).items()})


def _unsettled(graph: fx.Graph, left: dict[Attribute, Any], again: Repetition) -> list[Attribute]:
    """Returns the attributes without whose state a graph can't do."""
    if again.graph is None:
        return list(left)

    def comes_from_the_state(node: fx.Node) -> bool:
        return not above_with_writes(node).isdisjoint(again.of_the_state)

    moved = [
        attribute
        for attribute, value in again.values.items()
        if attribute not in left or not left_values.is_settled(left[attribute], value, comes_from_the_state)
    ]
    moved += [attribute for attribute, value in left.items() if _is_outside(attribute) and _varies(value)]
    if moved or str(graph) == str(again.graph):
        return moved
    # the second graph reads what the first call has left: it must compute the same from it as the first one did
    if not computes_the_same(graph, again.graph, again.of_the_state):
        return list(left)
    if _orders_the_state(again, comes_from_the_state):
        return list(left)
    return [attribute for attribute, value in left.items() if _varies(value)]


def _is_outside(attribute: Attribute) -> bool:
    """Tells whether others may look at an attribute, such as one of an object to which a hook gives what it sees."""
    return not isinstance(attribute.namespace.of, nn.Module)


def _varies(value: Any) -> bool:
    """Tells whether what a call leaves in an attribute may be another thing than a later call would leave.

    It is, if it comes from arguments or random numbers. What comes from parameters alone is a cache in a dictionary,
    which knows what its values are for; in an attribute of its own it is what the parameters were at that time.
    """
    nodes = [node for proxy in left_values.proxies_in(value) for node in above_with_writes(proxy.node)]
    is_cache = isinstance(value, dict)
    return any(varies(node) or (not is_cache and is_trained(node)) for node in nodes)


def _orders_the_state(again: Repetition, comes_from_the_state: Callable[[fx.Node], bool]) -> bool:
    """Tells whether the second recording decided if something is more or less than what the first one has left.

    So do caches that only grow, and sizes that only shrink: what they hold is that of the largest call so far.
    """
    assert again.graph is not None
    decided = {source for node in again.graph.nodes if node.target is guards.expect for source in above(node)}
    return any(_is_ordering(node) and comes_from_the_state(node) for node in decided)


def _is_ordering(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if not node.op.startswith("call_") or name.strip("_") not in ("lt", "le", "gt", "ge"):
        return False
    # nothing can be decided on the values of floating-point tensors
    return not any(_is_floating(source.meta.get(VALUE)) for source in node.all_input_nodes)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _around(called: Collection[str], paths: list[str]) -> str:
    """Returns the path of the innermost module, among those `called`, that is or is around all of `paths`."""
    first, *others = paths
    around = [first, *(first[:end] for end in range(len(first) - 1, 0, -1) if first[end] == ".")]
    found = (path for path in around if path in called and all(f"{other}.".startswith(f"{path}.") for other in others))
    return next(found, "")
