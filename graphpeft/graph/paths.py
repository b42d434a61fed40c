"""Dotted paths of modules and tensors in a model; the model's own path is empty."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def join(path: str, name: str) -> str:
    """Returns the path of the attribute `name` of the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


def within(path: str, outer: str) -> str:
    """Returns `path` relative to the module at `outer`, which contains it."""
    return path[len(outer) + 1 :] if outer else path


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Returns ``dict(model.named_modules())``, without the cost of one nested generator per level of depth."""
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
    """A set of tensor paths, indexed by the tensors' modules."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def add(self, path: str, name: str) -> None:
        """Adds the tensor `name` of the module at `path`."""
        self._names.setdefault(path, set()).add(name)

    def add_all(self, path: str, names: Iterable[str]) -> None:
        """Adds tensors of the module at `path`."""
        self._names.setdefault(path, set()).update(names)

    def discard(self, path: str, name: str) -> None:
        """Removes the tensor, if present."""
        self.names(path).discard(name)

    def names(self, path: str) -> set[str]:
        """Returns the names of the set's tensors that belong to the module at `path`."""
        return self._names.get(path) or set()

    def __contains__(self, tensor: str) -> bool:
        path, _, name = tensor.rpartition(".")
        return name in self.names(path)
