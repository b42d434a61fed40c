"""Dotted paths of modules and tensors in a model; the model's own path is empty."""

from __future__ import annotations


def join(path: str, name: str) -> str:
    """Returns the path of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


def within(path: str, outer: str) -> str:
    """Returns the path, seen from the module at `outer`, of what is at `path` inside it."""
    return path[len(outer) + 1 :] if outer else path
