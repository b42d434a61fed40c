"""Dotted paths of modules and tensors in a model; the model's own path is empty."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def join(path: str, name: str) -> str:
    """Returns the path of what is called `name` in the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


def within(path: str, outer: str) -> str:
    """Returns the path, seen from the module at `outer`, of what is at `path` inside it."""
    return path[len(outer) + 1 :] if outer else path


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Returns what ``model.named_modules()`` yields, which takes the longer the deeper modules lie."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found[path] = module
        inner = module._modules
        if inner:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(inner.items()) if child is not None]
    return found


class TensorPaths:
    """A set of paths of tensors, which knows at once those of one module."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def add(self, path: str, name: str) -> None:
        """Adds the tensor `name` of the module at `path`."""
        self._names.setdefault(path, set()).add(name)

    def add_all(self, path: str, names: Iterable[str]) -> None:
        """Adds tensors of the module at `path`."""
        self._names.setdefault(path, set()).update(names)

    def discard(self, path: str, name: str) -> None:
        """Takes it out again, if it is there."""
        self.names(path).discard(name)

    def names(self, path: str) -> set[str]:
        """Returns the names of the tensors of the module at `path` that are in the set."""
        return self._names.get(path) or set()

    def __contains__(self, tensor: str) -> bool:
        path, _, name = tensor.rpartition(".")
        return name in self.names(path)
