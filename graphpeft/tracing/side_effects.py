"""Side effects: which modules a graph can't hold, since they leave state for their next call.

A graph holds no state beside tensors that it writes in place. So a forward that assigns ``self.pooled = …``, fills a
dictionary or counts in a global becomes a graph only where that makes no difference:

- what it sets before it reads it is of no use to the next call;
- a cache of what follows from sizes and parameters alone can be computed anew in each run.

Which it is shows when the forward is recorded a second time, from the state in which the first time left all that it
can reach: the state must not change any further, and what the second graph reads of it must not come from the inputs'
values. Nor may such a value be left outside of the modules, where others look for it, as for what a hook has kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import pytree
from graphpeft.code import contents
from graphpeft.code.namespaces import Attribute
from graphpeft.graph import guards
from graphpeft.graph.errors import OUT_OF_MEMORY, TraceError
from graphpeft.graph.facts import above, above_with_writes, is_trained, varies
from graphpeft.graph.template import VALUE
from graphpeft.tracing.graph_equality import equivalent
from graphpeft.tracing.recorder import Recorder


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


def stateful_modules(
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
        left = {attribute: _value_of(attribute) for attribute in changed}
    assert tracer.session.recording is not None
    before = tracer.session.recording.before
    writers, called = tracer.session.assigners, tracer.session.called
    again = _recorded_again(tracer, record_again, changed)
    paths = {module: path for path, module in root.named_modules()}
    found: dict[str, str] = {}
    with tracer.examples.real_calls(makes_tensors=False):
        unstable = _unstable(graph, left, again)
    for attribute in unstable:
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
    """Returns the modules among `owners` of some state whose code is in the graph: each of them must leave it."""
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
        values = {attribute: _value_of(attribute) for attribute in attributes}
    return Repetition(graph, error, values, {made: node for node, made in (tracer.session.left or {}).items()})


def _unstable(graph: fx.Graph, left: dict[Attribute, Any], again: Repetition) -> list[Attribute]:
    """Returns the attributes whose state a graph would need."""
    if again.graph is None:
        return list(left)

    def comes_from_the_state(node: fx.Node) -> bool:
        return not above_with_writes(node).isdisjoint(again.of_the_state)

    moved = [
        attribute
        for attribute, value in again.values.items()
        if attribute not in left or not _is_stable(left[attribute], value, comes_from_the_state)
    ]
    moved += [attribute for attribute, value in left.items() if _is_outside(attribute) and _varies(value)]
    if moved or str(graph) == str(again.graph):
        return moved
    # the second graph reads what the first call has left: it must compute the same from it as the first one did
    if not equivalent(graph, again.graph, again.of_the_state):
        return list(left)
    if _orders_the_state(again, comes_from_the_state):
        return list(left)
    return [attribute for attribute, value in left.items() if _varies(value)]


def _is_outside(attribute: Attribute) -> bool:
    """Returns whether others may look at an attribute, such as one of an object to which a hook gives what it sees."""
    return not isinstance(attribute.namespace.of, nn.Module)


def _varies(value: Any) -> bool:
    """Returns whether what a call leaves in an attribute may be another thing than a later call would leave.

    It is, if it comes from arguments or random numbers. What comes from parameters alone is a cache in a dictionary,
    which knows what its values are for; in an attribute of its own it is what the parameters were at that time.
    """
    nodes = [node for proxy in _proxies_in(value) for node in above_with_writes(proxy.node)]
    is_cache = isinstance(value, dict)
    return any(varies(node) or (not is_cache and is_trained(node)) for node in nodes)


def _orders_the_state(again: Repetition, comes_from_the_state: Callable[[fx.Node], bool]) -> bool:
    """Returns whether the second recording decided if something is more or less than what the first one has left.

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


# the values that a recording leaves

_ABSENT = object()


def _value_of(attribute: Attribute) -> Any:
    """Returns what an attribute holds now, with copies of its containers; something of its own if it isn't there."""
    namespace, name = attribute
    buffers = namespace.of._buffers if isinstance(namespace.of, nn.Module) else {}
    held = buffers if name in buffers else namespace.values()
    return _copied(held.get(name, _ABSENT))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in dict.items(value)}
    if isinstance(value, tuple | list | deque):
        return [type(value), *map(_copied, contents.parts_of(value))]
    if contents.has_content(value):
        return contents.comparable(value)
    return set(value) if isinstance(value, set) else value


def _is_stable(value: Any, later: Any, of_the_state: Callable[[fx.Node], bool]) -> bool:
    """Returns whether a second call leaves in an attribute what the first one did.

    Args:
        value: What the first call left there, see `_value_of`.
        later: What the second one did.
        of_the_state: Tells of a node whether its value comes from what the first call left.
    """
    if value is later:
        return True
    if isinstance(value, fx.Proxy) and isinstance(later, fx.Proxy):
        return _facts(value) == _facts(later) and not of_the_state(later.node)
    if type(value) is not type(later):
        return False
    if isinstance(value, dict):
        # keys may be traced numbers, whose comparison would be recorded
        keys, other_keys = ([_facts(key) if isinstance(key, fx.Proxy) else key for key in of] for of in (value, later))
        pairs = zip(value.values(), later.values(), strict=False)
        return keys == other_keys and all(_is_stable(a, b, of_the_state) for a, b in pairs)
    if isinstance(value, list):
        pairs = zip(value, later, strict=False)
        return len(value) == len(later) and all(_is_stable(a, b, of_the_state) for a, b in pairs)
    return isinstance(value, _COMPARED) and value == later


_COMPARED = (bool, int, float, complex, str, set, type, torch.dtype, torch.device)


def _facts(proxy: fx.Proxy) -> Any:
    def fact(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(fact, proxy.node.meta.get(VALUE))


def _proxies_in(value: Any) -> Iterator[fx.Proxy]:
    """Yields the traced values in what `_value_of` returned."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _proxies_in(part)
