"""Finds comparisons by ``is`` in a forward. A proxy can't be True or False, and can't always be the same object.

Bytecode is read first, since it quickly shows code without such comparisons.
"""

from __future__ import annotations

import ast
import dis
import enum
import functools
import itertools
from collections.abc import Iterator, Set
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch

from graphpeft.code.attribute_paths import tree_of
from graphpeft.code.source import cached_by_class, functions_in_forward, reached_in_forward


@cached_by_class
def uses_is_true(cls: type) -> bool:
    """Returns whether `cls`'s forward, or a function that it calls, compares a value with True or False by ``is``.

    ``match`` does so, too, and asks for a value's class.
    """
    codes = (function.__code__ for function in functions_in_forward(cls))
    trees = (tree_of(code) for code in codes if _may_test_truth(code))
    # code without source may do so
    return any(tree is None or any(map(_is_identity_test, ast.walk(tree))) for tree in trees)


def _may_test_truth(code: CodeType) -> bool:
    return any(
        _MATCH_CLASS in inner.co_code[::2]
        or (_IS in inner.co_code[::2] and any(isinstance(constant, bool) for constant in inner.co_consts))
        for inner in _with_inner(code)
    )


_IS, _MATCH_CLASS = dis.opmap["IS_OP"], dis.opmap["MATCH_CLASS"]


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """Yields `code` and the code of functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _is_identity_test(node: ast.AST) -> bool:
    if isinstance(node, ast.MatchClass | ast.MatchSingleton):
        return True
    if not isinstance(node, ast.Compare) or not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return False
    sides = (node.left, *node.comparators)
    return any(isinstance(side, ast.Constant) and isinstance(side.value, bool) for side in sides)


@functools.cache
def tests_identity(code: CodeType) -> bool:
    """Returns whether `code` compares by ``is`` with another object than None."""
    instructions = list(dis.get_instructions(code))
    return any(
        after.opname == "IS_OP" and (before.opname != "LOAD_CONST" or before.argval is not None)
        for before, after in itertools.pairwise(instructions)
    )


@functools.cache
def compares_objects(code: CodeType) -> bool:
    """Returns whether `code` compares by ``is`` with an object that isn't a constant."""
    instructions = list(dis.get_instructions(code))
    return any(
        after.opname == "IS_OP" and before.opname != "LOAD_CONST" for before, after in itertools.pairwise(instructions)
    )


@cached_by_class
def forward_compares_objects(cls: type) -> bool:
    """Returns whether a forward, or a function that it calls, asks if two values are the same object."""
    return any(compares_objects(function.__code__) for function in functions_in_forward(cls))


@cached_by_class
def types_told_apart(cls: type) -> Set[type]:
    """Returns the types of plain values with which a forward may compare an argument by ``is``, as with a default."""
    if not forward_compares_objects(cls):
        return frozenset()
    return reached_in_forward(cls).kinds & _PLAIN


# not whole numbers: Python itself has one object for each small one
_PLAIN = {float, complex, tuple, list, dict}


def is_identity_compared(value: Any) -> bool:
    """Returns whether `value` is None, a string or an enum, which code compares by ``is``: a proxy would be unequal."""
    return value is None or isinstance(value, str | enum.Enum)


def may_be_compared(value: Any, code: CodeType | None) -> bool:
    """Returns whether `value` has a type that some code compares by ``is``, and `code` has such a comparison."""
    return isinstance(value, _OFTEN_COMPARED) and code is not None and tests_identity(code)


_OFTEN_COMPARED = (bool, torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)
