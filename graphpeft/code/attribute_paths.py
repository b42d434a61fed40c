"""The attributes that a function's code reads: by its source, or by its bytecode where there is none.

Code has no source if it was run by ``exec``, comes from a pickle, or from a file of bytecode alone. Its bytecode tells
the same names, but less of what becomes of their values; what it leaves open is taken for read.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

METADATA_ATTRIBUTES = {
    "dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_floating_point",
    "is_complex",
}  # fmt: skip
"""Attributes and methods of a tensor that read no values."""

ANY = "*"
"""In place of the name of an attribute: it may be any."""

Paths = tuple[tuple[str, bool], ...]
"""Paths of attributes, and whether each is called."""

_ALL_OF_THEM = frozenset((
    "parameters", "named_parameters", "get_parameter", "state_dict", "_parameters", "__getattr__", "__getattribute__",
))  # fmt: skip
"""Methods and attributes of modules that give whichever parameters there are."""

_CALLERS = {"checkpoint"}
"""Functions that call their first argument, and read nothing of it."""

_LOADS = ("LOAD_FAST", "STORE_FAST_LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")
"""How the names of instructions begin that load variables, the last of theirs on top."""

_BETWEEN = ("CACHE", "EXTENDED_ARG")
"""Instructions that do nothing."""


def paths_in(function: FunctionType, has_self: bool) -> Paths:
    """Returns the paths of attributes that a function loads from its first argument, and whether each is called.

    What is loaded from something else has the path ``*.name``, for each name in a row.

    Args:
        function: The function.
        has_self: Whether it is a method, whose first argument is what the paths begin at.
    """
    code = function.__code__
    first = code.co_varnames[0] if has_self and code.co_argcount else None
    tree = tree_of(code)
    return paths_in_bytecode(code, first) if tree is None else _in_source(tree, first)


@functools.lru_cache(maxsize=1024)
def tree_of(code: CodeType) -> ast.AST | None:
    """Returns the syntax tree of code, or None if it has no source, or if its file says something else by now."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    said = {getattr(node, kind) for node in ast.walk(tree) for kind in ("id", "attr", "name") if hasattr(node, kind)}
    # Python puts together those of imports and of attributes with two underscores
    return tree if all(name in said or "." in name or "__" in name for name in code.co_names) else None


@functools.lru_cache(maxsize=4096)
def _in_source(tree: ast.AST, first: str | None) -> Paths:
    around = {id(child): parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        parent = around.get(id(node))
        if isinstance(node, ast.Call) and _is_getattr(node):
            found += [(f"*.{name}", False) for name in _names_asked_for(node, first)]
        if isinstance(node, ast.Attribute) and node.attr in _ALL_OF_THEM:
            found.append((f"*.{ANY}", False))
        if not isinstance(node, ast.Attribute) or isinstance(parent, ast.Attribute):
            continue  # only whole paths
        if isinstance(node.ctx, ast.Load) and not _only_asked_about(node, parent):
            is_called = isinstance(parent, ast.Call) and _is_called(node, parent)
            found += _as_paths(*_names(node, first), is_called)
    return tuple(found)


def _as_paths(names: list[str], of_first: bool, is_called: bool) -> Iterator[tuple[str, bool]]:
    if of_first:
        yield ".".join(names), is_called
    else:
        yield from ((f"*.{name}", is_called) for name in names)


def _names(node: ast.Attribute, first: str | None) -> tuple[list[str], bool]:
    """Returns the names of attributes in a row, and whether they begin at the variable `first`."""
    names = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return names[::-1], isinstance(value, ast.Name) and value.id == first


def _is_called(node: ast.AST, call: ast.Call) -> bool:
    """Returns whether what `node` gives is called, by a call or by what it hands it to."""
    return call.func is node or (_name_of(call.func) in _CALLERS and call.args[:1] == [node])


def _name_of(function: ast.expr) -> str | None:
    return getattr(function, "attr", getattr(function, "id", None))


def _is_getattr(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1


def _names_asked_for(node: ast.Call, first: str | None) -> list[str]:
    name = node.args[1]
    if not isinstance(name, ast.Constant):
        return [ANY]
    # of self, an attribute that isn't a module's weight
    return [] if isinstance(node.args[0], ast.Name) and node.args[0].id == first else [str(name.value)]


def _only_asked_about(node: ast.Attribute, parent: ast.AST | None) -> bool:
    if node.attr in METADATA_ATTRIBUTES or isinstance(parent, ast.Compare):
        return True
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"


@functools.lru_cache(maxsize=4096)
def paths_in_bytecode(code: CodeType, first: str | None) -> Paths:
    """Returns the paths of attributes that bytecode loads, as `paths_in` does.

    Args:
        code: The code.
        first: The variable at which paths begin, or None.
    """
    found: list[tuple[str, bool]] = []
    names: list[str] = []
    of_first = is_called = False
    for instruction in dis.get_instructions(code):
        kind, value = instruction.opname, instruction.argval
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(value)
            is_called = kind == "LOAD_METHOD" or "NULL|self" in instruction.argrepr
        elif kind not in _BETWEEN:
            if names and names[-1] not in METADATA_ATTRIBUTES:
                found += _as_paths(names, of_first, is_called)
            is_called = False
            loaded: Any = value[-1] if isinstance(value, tuple) and value else value
            names, of_first = [], kind.startswith(_LOADS) and first is not None and loaded == first
            if kind == "LOAD_SUPER_ATTR":
                names.append(str(value))
            if kind == "LOAD_GLOBAL" and value == "getattr":
                found.append((f"*.{ANY}", False))
    if not _ALL_OF_THEM.isdisjoint(code.co_names):
        found.append((f"*.{ANY}", False))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found += paths_in_bytecode(inner, first if first in inner.co_freevars else None)
    return tuple(found)
