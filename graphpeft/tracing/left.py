"""What a recording leaves in attributes, and whether another one leaves the same there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import pytree
from graphpeft.code import contents
from graphpeft.code.namespaces import Attribute
from graphpeft.graph.template import VALUE

_ABSENT = object()


def value_of(attribute: Attribute) -> Any:
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


def is_settled(value: Any, later: Any, of_the_state: Callable[[fx.Node], bool]) -> bool:
    """Tells whether a second call leaves in an attribute what the first one did.

    Args:
        value: What the first call left there, see `value_of`.
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
        return keys == other_keys and all(is_settled(a, b, of_the_state) for a, b in pairs)
    if isinstance(value, list):
        pairs = zip(value, later, strict=False)
        return len(value) == len(later) and all(is_settled(a, b, of_the_state) for a, b in pairs)
    return isinstance(value, _COMPARED) and value == later


_COMPARED = (bool, int, float, complex, str, set, type, torch.dtype, torch.device)


def _facts(proxy: fx.Proxy) -> Any:
    def fact(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(fact, proxy.node.meta.get(VALUE))


def proxies_in(value: Any) -> Iterator[fx.Proxy]:
    """Yields the traced values in what `value_of` returned."""
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from proxies_in(part)
