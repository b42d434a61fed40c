"""Reads from a class's source which attributes its forward uses, among them the weights of modules inside it.

A weight that another module reads, as ``F.linear(x, self.qkv.weight)`` does, is not reached through the forward of the
module that owns it. A trace of that other module would tell, but a model has hundreds of modules; their source is quick
to read.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn

_ABOUT = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda"}
"""What code asks of a tensor without using its values."""


@functools.cache
def read_in_forward(cls: type) -> dict[str, set[str]]:
    """Returns the attributes of ``self`` whose values `cls`'s forward reads, itself or in a method that it calls.

    Returns:
        The names of the methods that read it, by the path of the attribute, such as ``qkv.weight``; nothing of what
        has no source.
    """
    read: dict[str, set[str]] = {}
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for path, is_call in _paths(getattr(cls, name, None)):
            if not is_call:
                read.setdefault(path, set()).add(name)
            elif inspect.isfunction(getattr(cls, path, None)) and path not in seen:
                seen.add(path)
                waiting.append(path)
    return read


def _paths(method: object) -> list[tuple[str, bool]]:
    """Returns the paths of attributes of ``self`` that a method loads, and whether each is called."""
    method = inspect.unwrap(method) if callable(method) else method
    if not inspect.isfunction(method) or method.__module__ == nn.Module.__module__:
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return []
    inner = {id(child): parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = []
    for node in ast.walk(tree):
        parent = inner.get(id(node))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not isinstance(parent, ast.Attribute):
            path = _path(node)
            if path is not None and not _only_asked_about(node, parent):
                found.append((path, isinstance(parent, ast.Call) and parent.func is node))
    return found


def _path(node: ast.Attribute) -> str | None:
    parts = [node.attr]
    while isinstance(node.value, ast.Attribute):
        node = node.value
        parts.append(node.attr)
    return ".".join(reversed(parts)) if isinstance(node.value, ast.Name) and node.value.id == "self" else None


def _only_asked_about(node: ast.Attribute, parent: ast.AST | None) -> bool:
    if node.attr in _ABOUT or isinstance(parent, ast.Compare):
        return True
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
