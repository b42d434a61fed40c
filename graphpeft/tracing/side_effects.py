"""Finds modules with side effects, which a graph can't hold: they set state that their next call reads.

A graph has no state except tensors that it writes in place. So a forward that assigns ``self.pooled = …``, fills a
dictionary or counts in a global becomes a graph only if this makes no difference:

- the forward sets the state before it reads it, so the next call doesn't need the state;
- the state is a cache of values that depend on sizes and parameters alone, which each run can compute again.

A second recording, which starts from the state that the first recording has set, tests this: the state must not change
further, and state that the second graph reads must not depend on the values of inputs. State that depends on them must
not be stored outside the modules either, where other code may read it, such as in an object of a hook.
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
from graphpeft.graph.dependencies import above, above_with_writes, is_trained, varies
from graphpeft.graph.errors import OUT_OF_MEMORY, TraceError
from graphpeft.graph.template import VALUE
from graphpeft.tracing.graph_equality import equivalent
from graphpeft.tracing.recorder import Recorder


class Repetition(NamedTuple):
    """A second recording.

    Attributes:
        graph: Its graph, or None if it failed.
        error: The text of the error, for the message, or an empty string.
        values: The values after it of the attributes that either recording changed.
        of_the_state: The nodes that read state of the first recording, with the first recording's nodes.
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
    """Returns the paths of the modules that must stay calls, with the reasons."""
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
            path = _innermost_around(called, [paths[module], *writers.get(attribute, ())])
            if not path:
                raise TraceError(reason)
            found.setdefault(path, reason)
    return found


def _inlined(owners: list[nn.Module], paths: Mapping[nn.Module, str], called: Collection[str]) -> list[nn.Module]:
    """Returns the inlined modules among the `owners` of some state, or the first owner if none is inlined.

    All inlined owners must stay calls.
    """
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
    """Returns the attributes whose state later calls need."""
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
    # the second graph reads state of the first call, and must compute the same as the first graph
    if not equivalent(graph, again.graph, again.of_the_state):
        return list(left)
    if _orders_the_state(again, comes_from_the_state):
        return list(left)
    return [attribute for attribute, value in left.items() if _varies(value)]


def _is_outside(attribute: Attribute) -> bool:
    """Returns whether an attribute is outside the modules, where other code may read it, such as in a hook's object."""
    return not isinstance(attribute.namespace.of, nn.Module)


def _varies(value: Any) -> bool:
    """Returns whether another call may set another value.

    So do values that depend on arguments or random numbers. A value that depends on parameters alone is a cache if a
    dictionary holds it, with a key. In an attribute of its own it may be outdated, since training changes parameters.
    """
    nodes = [node for proxy in _proxies_in(value) for node in above_with_writes(proxy.node)]
    is_cache = isinstance(value, dict)
    return any(varies(node) or (not is_cache and is_trained(node)) for node in nodes)


def _orders_the_state(again: Repetition, comes_from_the_state: Callable[[fx.Node], bool]) -> bool:
    """Returns whether the second recording decides on an order comparison (``<``, ``>``) with state of the first.

    Caches that only grow, and sizes that only shrink, make such comparisons: their state depends on all earlier calls.
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


def _innermost_around(called: Collection[str], paths: list[str]) -> str:
    """Returns the path of the innermost module in `called` that contains all of `paths` or is one of them."""
    first, *others = paths
    around = [first, *(first[:end] for end in range(len(first) - 1, 0, -1) if first[end] == ".")]
    found = (path for path in around if path in called and all(f"{other}.".startswith(f"{path}.") for other in others))
    return next(found, "")


# the values of attributes after a recording

_ABSENT = object()


def _value_of(attribute: Attribute) -> Any:
    """Returns the present value of an attribute, with containers copied, or `_ABSENT`."""
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
    """Returns whether an attribute has the same value after the second call as after the first."""
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
    """Yields the proxies in a value that `_value_of` returned."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _proxies_in(part)
