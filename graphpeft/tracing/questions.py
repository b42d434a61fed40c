"""Questions that a forward asks and no stand-in can answer: ``type(x)``, and ``is`` with True, False or an object.

Bytecode tells quickly that there are none, as mostly; the source tells which they are.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from graphpeft.tracing.source import names_in, tree_of


@functools.cache
def question_of_class(cls: type) -> str | None:
    """Returns the code by which `cls`'s forward asks for the class of an argument, or None."""
    trees = (tree_of(method) for method in _methods(cls) if _may_ask_for_class(method.__code__))
    return next((found for tree in trees if tree is not None and (found := _question_of_class(tree))), None)


@functools.cache
def tests_truth_by_identity(cls: type) -> bool:
    """Tells whether `cls`'s forward compares something with True or False by ``is``."""
    trees = (tree_of(method) for method in _methods(cls) if _may_test_truth(method.__code__))
    return any(any(map(_is_identity_test, ast.walk(tree))) for tree in trees if tree is not None)


def _methods(cls: type) -> Iterator[Any]:
    """Yields the forward, and the methods whose names stand in its code and in theirs."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        method = getattr(cls, waiting.pop(), None)
        method = inspect.unwrap(method) if callable(method) else method
        if not inspect.isfunction(method) or method.__module__ == nn.Module.__module__:
            continue
        yield method
        names = names_in(method.__code__).read - seen
        seen |= names
        waiting += [name for name in names if inspect.isfunction(inspect.getattr_static(cls, name, None))]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yields `code` and that of functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _may_ask_for_class(code: CodeType) -> bool:
    return any("type" in inner.co_names or not _MATCHES.isdisjoint(inner.co_code[::2]) for inner in _codes(code))


def _may_test_truth(code: CodeType) -> bool:
    return any(
        _IS in inner.co_code[::2] and any(isinstance(constant, bool) for constant in inner.co_consts)
        for inner in _codes(code)
    )


_IS = dis.opmap["IS_OP"]
_MATCHES = {opcode for name, opcode in dis.opmap.items() if name.startswith("MATCH_")}


def _question_of_class(tree: ast.AST) -> str | None:
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} - {"self"}

    def is_argument(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in arguments

    for node in ast.walk(tree):
        if isinstance(node, ast.Match) and is_argument(node.subject):
            return f"match {ast.unparse(node.subject)}"
        for side in (node.left, *node.comparators) if isinstance(node, ast.Compare) else ():
            if isinstance(side, ast.Call) and ast.unparse(side.func) == "type" and any(map(is_argument, side.args)):
                return ast.unparse(side)
    return None


def _is_identity_test(node: ast.AST) -> bool:
    if not isinstance(node, ast.Compare) or not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return False
    sides = (node.left, *node.comparators)
    return any(isinstance(side, ast.Constant) and isinstance(side.value, bool) for side in sides)


@functools.cache
def tests_identity(code: CodeType) -> bool:
    """Tells whether `code` asks whether something is another object than None."""
    instructions = list(dis.get_instructions(code))
    return any(
        after.opname == "IS_OP" and (before.opname != "LOAD_CONST" or before.argval is not None)
        for before, after in itertools.pairwise(instructions)
    )


@functools.cache
def compares_objects(code: CodeType) -> bool:
    """Tells whether `code` asks whether something is the same object as what is no constant."""
    instructions = list(dis.get_instructions(code))
    return any(
        after.opname == "IS_OP" and before.opname != "LOAD_CONST" for before, after in itertools.pairwise(instructions)
    )
