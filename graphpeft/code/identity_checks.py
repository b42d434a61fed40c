"""Finds where a forward tells objects apart. A proxy can't be True or False, and can't always be the same object.

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

from graphpeft.code.attribute_paths import nodes_in, path_of, tree_of
from graphpeft.code.source import cached_by_class, functions_in_forward, methods_run, values_in_forward


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
    return {*map(type, values_in_forward(cls))} & _PLAIN


# not whole numbers: Python itself has one object for each small one
_PLAIN = {float, complex, tuple, list, dict}


@cached_by_class
def looked_up_by(cls: type) -> Set[str]:
    """Returns the paths, "" for ``self``, of what a forward may look up in tables, or compare with other objects."""
    methods = methods_run(cls)
    return frozenset().union(*(_looked_up_by(each.__code__, each in methods) for each in functions_in_forward(cls)))


@functools.lru_cache(maxsize=4096)
def _looked_up_by(code: CodeType, is_method: bool) -> frozenset[str]:
    """Returns the paths from the first argument of code that it looks up; a method also hands on its own module."""
    if not code.co_argcount:
        return frozenset()
    tree, first = tree_of(code), code.co_varnames[0]
    if tree is None:
        return frozenset(("",))  # code without source may do so
    found = ((path_of(node, first), node, parent) for node, parent in nodes_in(tree))
    return frozenset(path for path, node, parent in found if path is not None and _looks_up(node, parent, is_method))


def _looks_up(node: ast.AST, parent: ast.AST | None, is_method: bool) -> bool:
    match parent:
        case ast.Attribute() | ast.arguments():
            return False
        case ast.Compare(ops=ops):
            return not {*map(type, ops)} <= {ast.Is, ast.IsNot}
        case ast.Subscript(slice=index):
            return node is index
        case ast.Call(func=ast.Name(id=name)):
            return name == "hash"
        case ast.Call(func=ast.Attribute(attr=name) as function):
            return function is not node and (is_method or name in _LOOK_UPS)
        case _:
            return is_method and isinstance(node, ast.Name)


_LOOK_UPS = frozenset(("get", "index", "count", "pop", "setdefault"))


def is_identity_compared(value: Any) -> bool:
    """Returns whether `value` is None, a string or an enum, which code compares by ``is``: a proxy would be unequal."""
    return value is None or isinstance(value, str | enum.Enum)


def may_be_compared(value: Any, code: CodeType | None) -> bool:
    """Returns whether `value` has a type that some code compares by ``is``, and `code` has such a comparison."""
    return isinstance(value, _OFTEN_COMPARED) and code is not None and tests_identity(code)


_OFTEN_COMPARED = (bool, torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)
