"""What a forward leaves on its modules for later calls, and whether a graph can do without it.

A graph holds no state beside tensors that it writes in place. So a forward that assigns ``self.pooled = …``, or fills a
dictionary, becomes a graph only where that makes no difference:

- what it sets before it reads it is of no use to the next call;
- a cache of what follows from sizes and parameters alone can be computed anew in each run.

Which it is shows when the forward is recorded a second time, from the state in which the first time left the modules:
the state must not change any further, and what the second graph reads of it must not come from the inputs' values.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn

from graphpeft.tracing.graph_module import VALUE
from graphpeft.tracing.masks import ASKED_ABOUT, attention_mask
from graphpeft.tracing.source import ABOUT

_CONTAINERS = (dict, list, set, deque)


class Attribute(NamedTuple):
    """An attribute of a module, or of an object that a module holds.

    Attributes:
        holder: The module or object.
        name: Its name there.
    """

    holder: Any
    name: str

    def __hash__(self) -> int:
        return hash((id(self.holder), self.name))

    def __eq__(self, other: object) -> bool:
        # an object of a user's may compare as it likes
        return isinstance(other, Attribute) and self.holder is other.holder and self.name == other.name


class Snapshot:
    """The attributes of all modules and of the objects that they hold at one time, with the content of containers.

    Args:
        root: The module with all of its submodules.
    """

    def __init__(self, root: nn.Module) -> None:
        self._owners: dict[int, nn.Module] = {}
        self._before: list[tuple[Any, dict[str, Any], list[tuple[str, Any, Any]]]] = []
        for module in root.modules():
            for holder in _holders(module, self._owners):
                self._before.append((holder, dict(holder.__dict__), list(_containers_of(holder))))

    def owner(self, attribute: Attribute) -> nn.Module:
        """Returns the module that has an attribute, or that holds the object which has it."""
        return self._owners[id(attribute.holder)]

    def changed(self) -> list[Attribute]:
        """Returns the attributes that have another value or another content now."""
        found: dict[Attribute, None] = {}
        for holder, attributes, containers in self._before:
            for name in {**attributes, **holder.__dict__}:
                if attributes.get(name, _ABSENT) is not holder.__dict__.get(name, _ABSENT):
                    found[Attribute(holder, name)] = None
            for name, container, content in containers:
                if name == "_buffers":
                    keys = [key for key in {**content, **container} if _differs(container, content, key)]
                    found |= dict.fromkeys(Attribute(holder, key) for key in keys)
                elif not _is_same(container, content):
                    found[Attribute(holder, name)] = None
        return list(found)

    def holds(self, value: Any) -> bool:
        """Tells whether `value` was in a container of a module."""
        contents = (content for _, _, containers in self._before for _, _, content in containers)
        parts = (part for content in contents for part in (content.values() if isinstance(content, dict) else content))
        return any(part is value for part in parts)

    def put_back(self, inside: nn.Module | None = None) -> None:
        """Gives all modules, or those inside one, their attributes and these their content again."""
        wanted = set(inside.modules()) if inside is not None else None
        for holder, attributes, containers in self._before:
            if wanted is None or self._owners[id(holder)] in wanted:
                _refill(holder.__dict__, attributes)
                for _, container, content in containers:
                    _refill(container, content)


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Gives all modules their attributes again at the end."""
    before = Snapshot(root)
    try:
        yield
    finally:
        before.put_back()


_ABSENT = object()


def _differs(left: dict[str, Any], right: dict[str, Any], key: str) -> bool:
    return left.get(key, _ABSENT) is not right.get(key, _ABSENT)


def _holders(module: nn.Module, owners: dict[int, nn.Module]) -> Iterator[Any]:
    """Yields a module and the objects of users' classes that it holds, and notes in `owners` whose they are."""
    waiting: list[Any] = [module]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple | dict):
            waiting += value.values() if isinstance(value, dict) else value
        elif (value is module or _is_of_a_user(value)) and id(value) not in owners:
            owners[id(value)] = module
            yield value
            waiting += value.__dict__.values()


def _is_of_a_user(value: Any) -> bool:
    cls = type(value)
    if isinstance(value, type | nn.Module | torch.Tensor | ModuleType) or not hasattr(value, "__dict__"):
        return False
    return not callable(value) and cls.__module__.partition(".")[0] not in _LIBRARIES


_LIBRARIES = frozenset(("builtins", "collections", "enum", "functools", "logging", "numpy", "re", "threading", "torch"))
"""Whose objects hold nothing that a forward changes."""


def _containers_of(holder: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the containers that an object holds: the attribute's name, the container, and a copy."""
    seen: set[int] = set()
    waiting = list(holder.__dict__.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, tuple):
            waiting += [(name, part) for part in value]
        elif isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))
            yield name, value, copy.copy(value)
            parts = value.values() if isinstance(value, dict) else value
            waiting += [(name, part) for part in parts]


def _is_same(container: Any, content: Any) -> bool:
    """Tells whether a container holds the very objects that its copy does, in their order."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in content.items())
    if isinstance(container, set):
        return container == content
    return all(now is was for now, was in zip(container, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    """Puts back the content of a container, touching only what differs: other threads may run the model meanwhile."""
    if isinstance(container, dict):
        for key in [key for key in container if key not in content]:
            del container[key]
        for key, value in content.items():
            if key not in container or container[key] is not value:
                container[key] = value
    elif not _is_same(container, content):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(content)


def value_of(attribute: Attribute) -> Any:
    """Returns what an attribute holds now, with copies of its containers; something of its own if it isn't there."""
    holder, name = attribute
    buffers = holder._buffers if isinstance(holder, nn.Module) else {}
    held = buffers if name in buffers else holder.__dict__
    return _copied(held.get(name, _ABSENT))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, tuple | list | deque):
        return [type(value), *map(_copied, value)]
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


def above(node: fx.Node) -> set[fx.Node]:
    """Returns the nodes from whose values that of `node` is computed, `node` among them."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += used_by(source)
    return found


def used_by(node: fx.Node) -> list[fx.Node]:
    """Returns the inputs of `node` whose values it uses; of others it only asks something, such as their shape."""
    about = node.args[1] if node.target is getattr else node.target
    if about in ABOUT:
        return []
    asked = [node.kwargs.get(name) for name in ASKED_ABOUT] if node.target is attention_mask else []
    return [source for source in node.all_input_nodes if source not in asked]


def varies(node: fx.Node) -> bool:
    """Tells whether a node's value may be another one in each run: an argument, a random number, a module's result."""
    if node.op == "placeholder" or node.op == "call_module":
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "get_attr" and is_random(name)


def is_trained(node: fx.Node) -> bool:
    """Tells whether a node reads a tensor of a module that training may change."""
    value = node.meta.get(VALUE)
    return node.op == "get_attr" and (isinstance(value, nn.Parameter) or getattr(value, "requires_grad", False))


def is_random(name: str) -> bool:
    """Tells by its name whether a function draws random numbers."""
    return _RANDOM.search(name) is not None


_RANDOM = re.compile(
    r"rand|dropout|normal(?!ize)|uniform|bernoulli|multinomial|poisson|exponential|geometric|cauchy|rrelu"
)
