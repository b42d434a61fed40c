"""Snapshots of all state that a model's forward can reach, to detect changes and to restore the state."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

from torch import nn

from graphpeft.code import contents
from graphpeft.code.namespaces import Attribute, Namespace
from graphpeft.code.reach import Reach
from graphpeft.tracing.iterators import exchange_for_copies

_ABSENT = object()

_Held = tuple[Namespace, dict[str, Any], list[tuple[str, Any, Any]]]
"""A namespace, its values by name, and its mutable objects: name, object and content."""


class Snapshot:
    """The values of all names that a forward can reach, and the contents of mutable objects among them."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._before: list[_Held] = []
        self._held: set[int] | None = None
        self._values: dict[Hashable, dict[str, Any]] = {}
        for namespace in reach.namespaces:
            values = dict(namespace.values())
            changeable = contents.changeable_parts(values.items())
            kept = [(name, value, contents.content_of(value)) for name, value in changeable]
            self._before.append((namespace, values, kept))
            self._values[namespace.key] = values

    def owners(self, attribute: Attribute) -> list[nn.Module]:
        """Returns the modules whose code can reach the namespace of an attribute."""
        return self._reach.owners(attribute.namespace)

    def changed(self, inside: nn.Module | None = None) -> list[Attribute]:
        """Returns the attributes that have another value or content now; with `inside`, only those it can reach."""
        found: dict[Attribute, None] = {}
        for namespace, values, kept in self._reached_from(inside):
            now = namespace.values()
            for name in {**values, **now}:
                if values.get(name, _ABSENT) is not now.get(name, _ABSENT):
                    found[Attribute(namespace, name)] = None
            for name, value, content in kept:
                if name == "_buffers":
                    keys = [key for key in {**content, **value} if _differs(value, content, key)]
                    found |= dict.fromkeys(Attribute(namespace, key) for key in keys)
                elif not contents.is_unchanged(value, content):
                    found[Attribute(namespace, name)] = None
        return list(found)

    def has(self, module: nn.Module, name: str, value: Any) -> bool:
        """Returns whether an attribute of a module was this same object."""
        return self._values.get(id(module), {}).get(name, _ABSENT) is value

    def holds(self, value: Any) -> bool:
        """Returns whether a name or a container in the snapshot holds `value`."""
        if self._held is None:
            self._held = {id(held) for _, values, _ in self._before for held in values.values()}
            self._held |= {
                id(part)
                for _, _, kept in self._before
                for _, _, content in kept
                if isinstance(content, contents.CONTAINERS)
                for part in contents.parts_of(content)
            }
        return id(value) in self._held

    def put_back(self) -> None:
        """Restores the values of all names, and the contents of mutable objects."""
        for namespace, values, kept in self._before:
            _bind_again(namespace, values)
            for _, value, content in kept:
                contents.put_back(value, content)

    def _reached_from(self, inside: nn.Module | None) -> Iterator[_Held]:
        wanted = set(inside.modules()) if inside is not None else None
        for held in self._before:
            if wanted is None or not wanted.isdisjoint(self._reach.owners(held[0])):
                yield held


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Restores all state that the forward of a module can reach at the end; inside, iterators are copies."""
    reach = Reach(root)
    before = Snapshot(reach)
    try:
        exchange_for_copies(reach)
        yield
    finally:
        before.put_back()


def _differs(left: dict[str, Any], right: dict[str, Any], key: str) -> bool:
    return left.get(key, _ABSENT) is not right.get(key, _ABSENT)


def _bind_again(namespace: Namespace, values: dict[str, Any]) -> None:
    """Restores only the names that differ, since other threads may run the model meanwhile."""
    now = dict(namespace.values())
    for name in [name for name in now if name not in values]:
        namespace.unbind(name)
    for name, value in values.items():
        if name not in now or now[name] is not value:
            namespace.bind(name, value)
