"""Finds the attributes that a function's code reads, from its source, or from its bytecode if there is no source.

Code run by ``exec``, from a pickle or from a ``.pyc`` file has no source. Its bytecode holds the same names, but shows
less of the uses of their values; an attribute with an unclear use counts as read.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

METADATA_ATTRIBUTES = {
    "dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_floating_point",
    "is_complex",
}  # fmt: skip
"""Attributes and methods of a tensor that don't read its elements."""

ANY = "*"
"""Stands for any attribute name."""

_ALL_PARAMETERS = frozenset((
    "parameters", "named_parameters", "get_parameter", "state_dict", "_parameters", "__getattr__", "__getattribute__",
))  # fmt: skip
"""Methods and attributes of modules that give access to all parameters."""

_LOADS = ("LOAD_FAST", "STORE_FAST_LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")
"""Prefixes of instructions that load variables; the last variable of an instruction is on top of the stack."""

_NO_OPERATIONS = ("CACHE", "EXTENDED_ARG")
"""Instructions without effect."""


def paths_in(function: FunctionType, has_self: bool) -> tuple[str, ...]:
    """Returns the paths of attributes that a function reads from its first argument.

    An attribute of another object has the path ``*.name``; ``x.a.b`` gives ``*.a`` and ``*.b``.
    """
    code = function.__code__
    first = code.co_varnames[0] if has_self and code.co_argcount else None
    tree = tree_of(code)
    return paths_in_bytecode(code, first) if tree is None else _in_source(tree, first)


@functools.lru_cache(maxsize=1024)
def tree_of(code: CodeType) -> ast.AST | None:
    """Returns the syntax tree of code, or None if it has no source, or if its file has changed since."""
    try:
        tree = ast.parse(textwrap.dedent(_source_of(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    said = {
        getattr(node, kind) for node, _ in _nodes_in(tree) for kind in ("id", "attr", "name") if hasattr(node, kind)
    }
    # Python joins names of imports by dots, and mangles attributes with two underscores
    return tree if all(name in said or "." in name or "__" in name for name in _names_of(code)) else None


def _source_of(code: CodeType) -> str:
    """Returns the source of a function's code."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    # inspect looks through all of Python's modules for that of the code, which takes most of its time
    begins = bool(lines) and lines[0].lstrip().startswith(("def ", "async def ", "@"))
    return "".join(inspect.getblock(lines)) if begins else inspect.getsource(code)


@functools.lru_cache(maxsize=1024)
def _nodes_in(tree: ast.AST) -> Sequence[tuple[Any, Any]]:
    """Returns all nodes of a syntax tree, each with the one around it."""
    found: list[tuple[Any, Any]] = [(tree, None)]
    for node, _ in found:
        for name in node._fields:
            if name != "ctx":
                value = getattr(node, name, None)
                inner = value if isinstance(value, list) else (value,)
                found += [(child, node) for child in inner if isinstance(child, ast.AST)]
    return found


def _names_of(code: CodeType) -> Iterator[str]:
    """Yields the names that code reads, and those that functions inside of it read."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_of(inner)


@functools.lru_cache(maxsize=4096)
def _in_source(tree: ast.AST, first: str | None) -> tuple[str, ...]:
    found: list[str] = []
    of_metadata = {id(read) for node, _ in _nodes_in(tree) if (read := _asked_for_metadata(node)) is not None}
    for node, parent in _nodes_in(tree):
        if id(node) in of_metadata:
            continue
        if isinstance(node, ast.Call) and _is_getattr(node):
            found += [f"*.{name}" for name in _names_asked_for(node, first)]
        if isinstance(node, ast.Attribute) and node.attr in _ALL_PARAMETERS and not _is_of_signature(node):
            found.append(f"*.{ANY}")
        if not isinstance(node, ast.Attribute) or isinstance(parent, ast.Attribute):
            continue  # the path ends at an outer node
        if isinstance(node.ctx, ast.Load) and node.attr not in METADATA_ATTRIBUTES:
            found += _as_paths(*_names(node, first))
    return tuple(found)


def _asked_for_metadata(node: ast.AST) -> ast.expr | None:
    """Returns ``x.parameters`` of ``next(x.parameters()).dtype``, or None."""
    match node:
        case ast.Attribute(
            value=ast.Call(func=ast.Name(id="next"), args=[ast.Call(func=ast.Attribute(attr="parameters") as read), *_])
        ) if node.attr in METADATA_ATTRIBUTES:
            return read
    return None


def _as_paths(names: list[str], of_first: bool) -> list[str]:
    return [".".join(names)] if of_first else [f"*.{name}" for name in names]


def _names(node: ast.Attribute, first: str | None) -> tuple[list[str], bool]:
    """Returns the attribute names of a path such as ``x.a.b``, and whether the path starts at the variable `first`."""
    names = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return names[::-1], isinstance(value, ast.Name) and value.id == first


def _is_getattr(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1


def _is_of_signature(node: ast.Attribute) -> bool:
    """Returns whether an attribute is that of a function's signature, whose ``parameters`` are no tensors."""
    function = getattr(node.value, "func", None)
    return getattr(function, "attr", getattr(function, "id", None)) == "signature"


def _names_asked_for(node: ast.Call, first: str | None) -> list[str]:
    name = node.args[1]
    if not isinstance(name, ast.Constant):
        return [ANY]
    # getattr(self, "name") reads an attribute of the module itself, not a weight of a submodule
    return [] if isinstance(node.args[0], ast.Name) and node.args[0].id == first else [str(name.value)]


@functools.lru_cache(maxsize=4096)
def paths_in_bytecode(code: CodeType, first: str | None) -> tuple[str, ...]:
    """Returns the paths of attributes that bytecode reads, as `paths_in` does."""
    found: list[str] = []
    names: list[str] = []
    of_first = False
    for instruction in dis.get_instructions(code):
        kind, value = instruction.opname, instruction.argval
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(value)
        elif kind not in _NO_OPERATIONS:
            if names and names[-1] not in METADATA_ATTRIBUTES:
                found += _as_paths(names, of_first)
            loaded: Any = value[-1] if isinstance(value, tuple) and value else value
            names, of_first = [], kind.startswith(_LOADS) and first is not None and loaded == first
            if kind == "LOAD_SUPER_ATTR":
                names.append(str(value))
            if kind == "LOAD_GLOBAL" and value == "getattr":
                found.append(f"*.{ANY}")
                found += [f"*.{said}" for said in code.co_consts if str(said).isidentifier()]
    if not _ALL_PARAMETERS.isdisjoint(code.co_names):
        found.append(f"*.{ANY}")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found += paths_in_bytecode(inner, first if first in inner.co_freevars else None)
    return tuple(found)
