"""Reads from a class's source which attributes its forward uses, among them the weights of modules inside it.

A weight that another module reads, as ``F.linear(x, self.qkv.weight)`` does, is not reached through the forward of the
module that owns it. A trace of that other module would tell, but a model has hundreds of modules; their source is quick
to read.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

ABOUT = {
    "dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_floating_point",
    "is_complex",
}  # fmt: skip
"""What code asks of a tensor without using its values."""


ANY = "*"
"""In place of the name of an attribute: it may be any."""


class Uses(NamedTuple):
    """What a forward, and the methods that it calls on ``self``, use of the module.

    Attributes:
        read: The attributes of ``self`` whose values are read, by their paths such as ``qkv.weight``, with the names of
            the methods that do.
        called: The attributes of ``self`` that are called.
        read_elsewhere: The names of attributes that are read from something else than a path from ``self``, such as
            ``layer.weight``, where ``layer`` may be a module inside.
    """

    read: dict[str, set[str]]
    called: set[str]
    read_elsewhere: set[str]


@functools.cache
def uses_in_forward(cls: type) -> Uses:
    """Returns what `cls`'s forward uses; nothing of what has no source."""
    uses = Uses({}, set(), set())
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        tree = syntax_tree(getattr(cls, name, None))
        if tree is None:
            continue
        for path, is_call in _paths(tree):
            if path.startswith("*."):
                uses.read_elsewhere.add(path[2:])
            elif not is_call:
                uses.read.setdefault(path, set()).add(name)
            else:
                uses.called.add(path)
                if inspect.isfunction(getattr(cls, path, None)) and path not in seen:
                    seen.add(path)
                    waiting.append(path)
    return uses


@functools.cache
def functions_in_forward(cls: type) -> tuple[Callable[..., Any], ...]:
    """Returns the functions that a forward runs, as far as their names tell: itself, methods, and those of its file."""
    return functions_called(getattr(cls, "forward", None), cls)


def functions_called(function: Any, cls: type = object) -> tuple[Callable[..., Any], ...]:
    """Returns a function and those that it runs, as far as names tell: methods of `cls`, and those of its file."""
    waiting: list[Any] = [function]
    found: dict[Any, None] = {}
    while waiting:
        function = inspect.unwrap(waiting.pop()) if callable(waiting[-1]) else waiting.pop()
        if not inspect.isfunction(function) or function in found or _is_of_torch(function):
            continue
        found[function] = None
        for name in names_in(function.__code__).read:
            waiting += [inspect.getattr_static(cls, name, None), function.__globals__.get(name)]
    return tuple(found)


def _is_of_torch(function: Callable[..., Any]) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"  # generated code is of no Python module


class Names(NamedTuple):
    """Names in a function's code and in that of functions inside it.

    Attributes:
        read: Those of globals and attributes.
        made: Those of globals that it gives a value.
    """

    read: frozenset[str]
    made: frozenset[str]


@functools.cache
def names_in(code: CodeType) -> Names:
    """Returns the names in `code`."""
    inside = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    made = frozenset(
        str(instruction.argval)
        for instruction in (dis.get_instructions(code) if _STORES_GLOBAL in code.co_code else ())
        if instruction.opname == "STORE_GLOBAL"
    )
    read = frozenset(code.co_names)
    return Names(read.union(*(names.read for names in inside)), made.union(*(names.made for names in inside)))


_STORES_GLOBAL = bytes([dis.opmap["STORE_GLOBAL"]])

_TELLS = {"_assert", "print", "log", "debug", "info", "warning", "warning_once", "warn", "warn_once", "error"}
"""Names of functions whose arguments are for a person to read."""


@functools.cache
def only_tells(code: CodeType, line: int) -> bool:
    """Tells whether what `code` does at `line` of its file is no more than to tell a person something."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return False
    here = line - max(start, 1) + 1
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= here <= (n.end_lineno or n.lineno)]
    innermost = min(around, key=lambda n: (n.end_lineno or n.lineno) - n.lineno, default=None)
    if not isinstance(innermost, ast.Expr) or not isinstance(innermost.value, ast.Call):
        return False
    function = innermost.value.func
    return getattr(function, "attr", getattr(function, "id", None)) in _TELLS


def syntax_tree(method: object) -> ast.AST | None:
    """Returns the syntax tree of a function or a method of the user's, if it has source."""
    method = inspect.unwrap(method) if callable(method) else method
    if not inspect.isfunction(method) or method.__module__ == nn.Module.__module__:
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def methods_reading(cls: type, attribute: str) -> frozenset[str]:
    """Returns the names of `cls`'s methods that read an attribute of ``self``, called by its forward or not."""
    of_users = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    names = {name for base in of_users for name, value in vars(base).items() if inspect.isfunction(value)}
    names.discard("reset_parameters")  # by convention what fills the weights, before anything adapts them
    trees = {name: tree for name in names if (tree := syntax_tree(getattr(cls, name, None))) is not None}
    return frozenset(name for name, tree in trees.items() if _reads(tree, attribute))


def _reads(tree: ast.AST, attribute: str) -> bool:
    return any(path == attribute or path.startswith(f"{attribute}.") for path, _ in _paths(tree))


def _paths(tree: ast.AST) -> list[tuple[str, bool]]:
    """Returns the paths of attributes of ``self`` that a method loads, and whether each is called.

    What is loaded from something else than ``self`` has the path ``*.name``.
    """
    around = {id(child): parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = []
    for node in ast.walk(tree):
        parent = around.get(id(node))
        if isinstance(node, ast.Call) and _is_getattr(node):
            found += [(f"*.{name}", False) for name in _names_asked_for(node)]
        if isinstance(node, ast.Attribute) and node.attr in _ALL_OF_THEM:
            found.append((f"*.{ANY}", False))
        if not isinstance(node, ast.Attribute) or isinstance(parent, ast.Attribute):
            continue  # only whole paths
        if isinstance(node.ctx, ast.Load) and not _only_asked_about(node, parent):
            found.append((_path(node), isinstance(parent, ast.Call) and _is_called(node, parent)))
    return found


def _is_called(node: ast.AST, call: ast.Call) -> bool:
    """Tells whether what `node` gives is called, by a call or by what it hands it to."""
    return call.func is node or (_name_of(call.func) in _CALLERS and call.args[:1] == [node])


def _name_of(function: ast.expr) -> str | None:
    return getattr(function, "attr", getattr(function, "id", None))


_CALLERS = {"checkpoint"}
"""Functions that call their first argument, and read nothing of it."""


def _is_getattr(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1


def _names_asked_for(node: ast.Call) -> list[str]:
    name = node.args[1]
    if not isinstance(name, ast.Constant):
        return [ANY]
    # of self, an attribute that isn't a module's weight
    return [] if isinstance(node.args[0], ast.Name) and node.args[0].id == "self" else [str(name.value)]


_ALL_OF_THEM = frozenset(("parameters", "named_parameters", "get_parameter", "state_dict", "_parameters"))
"""Methods and attributes of modules that give whichever parameters there are."""


def _path(node: ast.Attribute) -> str:
    parts = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        parts.append(value.attr)
        value = value.value
    of_self = isinstance(value, ast.Name) and value.id == "self"
    return ".".join(reversed(parts)) if of_self else f"*.{node.attr}"


def _only_asked_about(node: ast.Attribute, parent: ast.AST | None) -> bool:
    if node.attr in ABOUT or isinstance(parent, ast.Compare):
        return True
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
