"""The settings of a graph: module attributes that are constants of the graph, checked by one node as a run begins.

A number that enters the computation of tensors has a node that reads it in each run, so that the graph follows its
changes. All other plain attributes, such as the number of attention heads, are settings.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import has_side_effect

from graphpeft.graph import guards


class Watch:
    """Counts the changes of attributes of a traced model's modules.

    Attributes:
        changes: The number of changes so far.
    """

    def __init__(self) -> None:
        self.changes = 0

    def sees(self, module: nn.Module) -> bool:
        """Returns whether a module's attributes are watched."""
        return module.__dict__.get(WATCH) is self


OF_CLASS = "_graphpeft_of_class"
"""The attribute of a `Place` that holds the names of attributes to read from its module's class."""


WATCH = "_graphpeft_watch"
"""The attribute of a module that holds its `Watch`."""


class Setting(NamedTuple):
    """A module attribute that is a constant of a graph.

    Attributes:
        path: The attribute's path.
        value: The attribute's value in the trace.
        line: The line of code that read the attribute, or branched on it.
        held: For a container: the function by which `value` was read of it, and its further arguments.
    """

    path: str
    value: Any
    line: str
    held: tuple[Any, ...] | None = None


class Reads(NamedTuple):
    """The module attributes on which a graph depends.

    Attributes:
        settings: The attributes that are constants of the graph.
        numbers: The paths of the numbers that the graph reads in each run.
    """

    settings: tuple[Setting, ...]
    numbers: tuple[str, ...]


def add_check(graph: fx.Graph, reads: Reads) -> None:
    """Adds a check of the settings to the graph of one module, which can read the module's attributes directly."""
    if reads.settings:
        with graph.inserting_before(_first(graph)):
            now = tuple(_present(graph, setting) for setting in reads.settings)
            values, lines = ([getattr(setting, name) for setting in reads.settings] for name in ("value", "line"))
            graph.call_function(guards.expect_each, (now, tuple(values), tuple(lines)))


def _present(graph: fx.Graph, setting: Setting) -> fx.Node:
    """Adds nodes that read a setting as its value was read."""
    now = graph.create_node("get_attr", setting.path)
    return now if setting.held is None else graph.call_function(setting.held[0], (now, *setting.held[1:]))


def _first(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


_Checked = tuple[nn.Module, str, Setting]
"""A module, the name of one of its attributes, and the setting for this attribute."""


class Settings:
    """Compares the settings of a graph with the modules' present attributes."""

    @classmethod
    def add(cls, graph: fx.Graph, root: nn.Module, name: str, reads: Reads, unread: list[str], watch: Watch) -> None:
        """Stores settings in attribute `name` of `root` and adds their check to `graph`; arguments as for the class."""
        read = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
        # the graph may not use all numbers
        reads = reads._replace(numbers=tuple(path for path in reads.numbers if path in read))
        setattr(root, name, cls(root, reads, unread, watch))
        with graph.inserting_before(_first(graph)):
            settings = graph.create_node("get_attr", name)
            checked = graph.create_node("call_function", expect_settings, (settings,), name="numbers")
        for index, path in enumerate(reads.numbers):
            node = read[path]
            with graph.inserting_before(node):
                number = graph.create_node("call_function", operator.getitem, (checked, index), name=node.name)
            number.meta = dict(node.meta)
            node.replace_all_uses_with(number)
            graph.erase_node(node)

    def __init__(self, root: nn.Module, reads: Reads, unread: list[str], watch: Watch) -> None:
        self.reads = reads
        self._root, self._unread_paths, self._watch = root, unread, watch
        self._find_owners()
        self._changes = watch.changes

    def _find_owners(self) -> None:
        """Finds the present owners of the attributes: modules may have been replaced."""
        self._numbers = [self._owner(path) for path in self.reads.numbers]
        self._unread = [(*self._owner(path), path) for path in self._unread_paths]
        self._watched: list[_Checked] = []
        self._unwatched: list[_Checked] = []
        for setting in self.reads.settings:
            module, name = self._owner(setting.path)
            # an attribute of the class may change there, where no watch sees it
            is_watched = self._watch.sees(module) and name in vars(module)
            (self._watched if is_watched else self._unwatched).append((module, name, setting))

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        owner, _, name = path.rpartition(".")
        try:
            return self._root.get_submodule(owner), name
        except AttributeError:
            guards.refuse(f"the module {owner} is gone, whose {name} was read when the graph was recorded")

    def checked(self) -> list[Any]:
        """Returns the numbers; raises GuardError if a setting has changed, or an unread attribute is set now."""
        if self._changes != self._watch.changes:
            self._find_owners()
            self._check_watched()
            self._changes = self._watch.changes
        _check(self._unwatched)
        numbers = [getattr(module, name, None) for module, name in self._numbers]
        for path, number in zip(self.reads.numbers, numbers, strict=True):
            if number is None or isinstance(number, str):
                guards.expect(number, "a number", path)
        return numbers

    def _check_watched(self) -> None:
        _check(self._watched)
        for module, name, path in self._unread:
            if name in module.__dict__ or name in module._parameters or name in module._buffers:
                guards.refuse(f"{path} is set, which was read when the graph was recorded, and which it doesn't read")


def _check(settings: list[_Checked]) -> None:
    for module, name, setting in settings:
        now = getattr(module, name, None)
        if not guards.is_same(now, setting.value):
            guards.expect(now, setting.value, f"{setting.path} in {setting.line}")


# without this mark, fx's dead code elimination would drop the check
@has_side_effect
def expect_settings(settings: Settings) -> list[Any]:
    """Returns the module numbers that a graph computes with, see `Settings.checked`."""
    return settings.checked()


def is_number(node: fx.Node) -> bool:
    """Returns whether a node of a flat graph reads a number of a module."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is expect_settings


CHECKS = (*guards.CHECKS, guards.expect_each, expect_settings)
"""Functions whose nodes check decisions of a trace, and compute nothing else."""
