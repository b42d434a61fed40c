"""Finds code that checks the class of a value by other means than ``isinstance``, which a proxy can't support."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

from graphpeft.code.attribute_paths import tree_of
from graphpeft.code.reach import functions_held, is_of_a_library
from graphpeft.code.source import cached_by_class, functions_called, functions_in_forward, names_in
from graphpeft.graph import in_place
from graphpeft.graph.errors import TraceError


def unsupported_type_check(module: nn.Module) -> str | None:
    """Returns the code of a check of a value's class in a module's forward, or in functions that the module holds.

    Functions that the forward calls by name are left out, since a trace sees whether the forward calls them.
    """
    held = functions_called(functions_held(module)).items()
    in_held = (type_check_in(function) for function, is_only_named in held if not is_only_named)
    return _type_check_in_class(in_place.original_class(module)) or next(filter(None, in_held), None)


@cached_by_class
def _type_check_in_class(cls: type) -> str | None:
    """Returns the code of a check of a value's class in `cls`'s forward, or in functions that run with it.

    Functions of libraries are left out: they check classes only for their messages.
    """
    own = {inspect.unwrap(value) for base in cls.__mro__ for value in vars(base).values() if callable(value)}
    for function, is_only_named in functions_in_forward(cls).items():
        if not is_only_named and (function in own or not is_of_a_library(function.__module__)):
            check = type_check_in(function)
            if check is not None:
                return check
    return None


def refuse_type_checks(module: nn.Module) -> None:
    """Raises TraceError if the forward of `module` checks the class of a value, since a proxy has another class."""
    check = unsupported_type_check(module)
    if check is not None:
        raise TraceError(type_check_message(f"{type(module).__name__}'s forward", check))


def type_check_message(code: str, check: str) -> str:
    """Returns the error message for code that checks the class of a value."""
    return f"{code} asks for the class of a value by `{check}`, which a graph can't answer; ask by isinstance"


def type_check_in(function: FunctionType) -> str | None:
    """Returns the code of a check of a value's class in a function, or None."""
    return _check(function.__code__) if function.__module__ != nn.Module.__module__ else None


@functools.lru_cache(maxsize=4096)
def _check(code: CodeType) -> str | None:
    may_match = any(opcode in code.co_code for opcode in _BYTES_OF_MATCHES)
    if not may_match and _NAMES.isdisjoint(names_in(code).read):
        return None
    own = code.co_varnames[0] if code.co_argcount else None
    tree = tree_of(code)  # slow, so only after the tests above
    return next(_checks(tree) if tree is not None else _checks_in_bytecode(code, own), None)


_NAMES = {"type", "__class__"}
_MATCHES = ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE")
_BYTES_OF_MATCHES = [bytes([dis.opmap[name]]) for name in _MATCHES]


def _checks_in_bytecode(code: CodeType, own: str | None) -> Iterator[str]:
    """Yields the class checks in code without source, except of the first argument, `own` (usually ``self``)."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("PUSH_NULL", "CACHE")]
    if any(each.opname in _MATCHES for each in instructions):
        yield "match"
    for before, after in itertools.pairwise(instructions):
        if before.opname == "LOAD_GLOBAL" and before.argval == "type" and after.argval != own:
            yield "type(…)"
        if after.argval == "__class__" and after.opname == "LOAD_ATTR" and before.argval != own:
            yield "….__class__"
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _checks_in_bytecode(inner, own if own in inner.co_freevars else None)


def _checks(tree: ast.AST) -> Iterator[str]:
    values = _names_of_values(tree)
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise | ast.JoinedStr):
            continue  # a message
        checked = _checked_value(node)
        if checked is not None and not values.isdisjoint(_names(checked)):
            yield f"match {ast.unparse(checked)}" if isinstance(node, ast.Match) else ast.unparse(node)
        # a call of the class, such as type(x)(…), isn't a check
        if isinstance(node, ast.Call) and _checked_value(node.func) is not None:
            waiting += node.args
        else:
            waiting += ast.iter_child_nodes(node)


def _checked_value(node: ast.AST) -> ast.expr | None:
    """Returns the expression whose class a node checks, or None."""
    if isinstance(node, ast.Match):
        patterns = [part for case in node.cases for part in ast.walk(case.pattern)]
        kinds = ast.MatchClass | ast.MatchMapping | ast.MatchSequence
        return node.subject if any(isinstance(pattern, kinds) for pattern in patterns) else None
    if isinstance(node, ast.Attribute):
        return node.value if node.attr == "__class__" else None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "type":
        return None
    return node.args[0] if len(node.args) == 1 else None


def _names_of_values(tree: ast.AST) -> set[str]:
    """Returns the names of arguments and variables that may have traced values, except items of `self` in loops."""
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)]
    own = {name for loop in loops if "self" in _names(loop.iter) for name in _names(loop.target)}
    return (arguments | variables) - own - {"self", "cls"}


def _names(expression: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
