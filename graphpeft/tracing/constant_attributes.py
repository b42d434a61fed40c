"""Decides which module attributes that a forward reads become constants of its graph (settings).

A node reads a number that takes part in tensor arithmetic, so the graph follows changes of this number. All other
plain attributes, such as the number of attention heads, are settings.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.node import map_arg

from graphpeft.code.attribute_paths import ANY
from graphpeft.code.contents import LONGEST, SETTINGS, attributes_read, entries, is_compared_whole, name_of
from graphpeft.code.source import cached_by_class, functions_in_forward, names_in, uses_in_forward
from graphpeft.graph import guards
from graphpeft.graph.dependencies import IN_PLACE, above, is_random, writes
from graphpeft.graph.drawing_functions import draws
from graphpeft.graph.hosts.patched_code import class_of_forward
from graphpeft.graph.settings import Reads, Setting
from graphpeft.graph.template import VALUE
from graphpeft.tracing.attributes import ABSENT, is_plain

_ARITHMETIC = frozenset((
    *(getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow", *IN_PLACE)),
    torch.add, torch.sub, torch.mul, torch.div, torch.pow,
    "add", "sub", "mul", "div", "pow", "add_", "sub_", "mul_", "div_", "pow_",
))  # fmt: skip
"""Arithmetic operations. Integers in other operations are sizes, indices or flags."""


def make_settings(graph: fx.Graph, lines: Mapping[str, str]) -> Reads:
    """Makes constants of the attributes that the graph decides on and of those that are sizes, indices or flags."""
    read = [node for node in graph.nodes if node.op == "get_attr" and node.target in lines]
    derived = _derived_from(graph, read)
    decided: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.target is guards.expect and node.args[0] in derived:
            decided |= {source: str(node.args[2]) for source in above(node.args[0]) if source not in decided}
    settings = {node: decided.get(node, lines[str(node.target)]) for node in read if node in decided or _is_fixed(node)}
    _make_constants(derived, set(settings))
    # an attribute can have several nodes: a module that stays a call in the end has read it, too
    by_path = {str(node.target): Setting(str(node.target), node.meta[VALUE], line) for node, line in settings.items()}
    numbers = dict.fromkeys(str(node.target) for node in read if node not in settings)
    return Reads(tuple(by_path.values()), tuple(numbers))


def settings_in_objects(module: nn.Module, read_once: Mapping[str, Any]) -> list[Setting]:
    """Returns the settings that a module has in containers and config objects, of which a graph has constants.

    Which entries and attributes code reads isn't known, so each is checked that it may read: all entries, and the
    attributes that the code names.
    """
    found: list[Setting] = []
    for path, value in read_once.items():
        around, _, own = path.rpartition(".")
        # of a dictionary of attributes, code reads these
        if own == "__dict__" or value is ABSENT:
            continue
        if type(value) in (list, set) and SETTINGS.issuperset(map(type, value)) and len(value) <= LONGEST:
            is_nan = any(each != each for each in value)
            found += [] if is_nan else [Setting(path, copy.copy(value), f"self.{path}")]
        else:
            found += _settings_in(path, value, _names_in(class_of_forward(module.get_submodule(around))), ())
    return found


def _settings_in(path: str, value: Any, names: tuple[str, ...], around: tuple[Any, ...]) -> Iterator[Setting]:
    """Yields the setting at a path, or those at the attributes of an object there."""
    if isinstance(value, nn.Module | torch.Tensor) or any(value is each for each in around):
        return
    if type(value) in SETTINGS or is_compared_whole(value):
        held = entries(value, names)
        if held is not None:
            yield Setting(path, held, f"self.{path}", (entries, names))
        return
    yield Setting(path, name_of(value), f"self.{path}", (name_of,))
    for name, held in attributes_read(value, names).items():
        yield from _settings_in(f"{path}.{name}", held, names, (*around, value))


@cached_by_class
def _names_in(cls: type) -> tuple[str, ...]:
    """Returns the names and texts in the code that a forward may run, with `ANY` if it computes some names."""
    named = [names_in(function.__code__) for function in functions_in_forward(cls)]
    found = {ANY} & uses_in_forward(cls).read_elsewhere
    return tuple(sorted(found.union(*(names.read | names.texts for names in named))))


def _derived_from(graph: fx.Graph, read: list[fx.Node]) -> dict[fx.Node, None]:
    """Returns the nodes `read` and the nodes with plain values computed only from them, in graph order."""
    derived = dict.fromkeys(read)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node in derived or not node.op.startswith("call_") or node.op == "call_module" or not inputs:
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target in guards.CHECKS or writes(node.target) or is_random(name) or draws(node.target):
            continue
        if all(source in derived for source in inputs) and VALUE in node.meta and is_plain(node.meta[VALUE]):
            derived[node] = None
    return derived


def _is_fixed(node: fx.Node) -> bool:
    """Returns whether an attribute has another use than tensor arithmetic."""
    if type(node.meta[VALUE]) is not int:
        return type(node.meta[VALUE]) is not float
    is_factor = (user.target in _ARITHMETIC and isinstance(user.meta.get(VALUE), torch.Tensor) for user in node.users)
    return not node.users or not all(is_factor)


def _make_constants(derived: dict[fx.Node, None], fixed: set[fx.Node]) -> None:
    for node in derived:
        if node.op != "get_attr" and all(source in fixed for source in node.all_input_nodes):
            fixed.add(node)
    for user in dict.fromkeys(user for node in fixed for user in node.users):
        user.args, user.kwargs = map_arg(
            (user.args, user.kwargs), lambda used: used.meta[VALUE] if used in fixed else used
        )
        if user.target in guards.CHECKS and not isinstance(user.args[0], fx.Node):
            user.graph.erase_node(user)
    for node in reversed(derived):
        if not node.users:
            node.graph.erase_node(node)
