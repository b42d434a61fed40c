"""Dotted paths of modules and tensors in a model; the model's own path is empty."""

from __future__ import annotations

from torch import nn

from graphpeft.graph.holders import Holder


def join(path: str, name: str) -> str:
    """Returns the path of the attribute `name` of the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


def within(path: str, outer: str) -> str:
    """Returns `path` relative to the module at `outer`, which contains it."""
    return path[len(outer) + 1 :] if outer else path


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Returns ``dict(model.named_modules())`` without the holders of adapters' tensors, and faster in deep models."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen or isinstance(module, Holder):
            continue
        seen.add(module)
        found[path] = module
        inner = module._modules
        if inner:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(inner.items()) if child is not None]
    return found
