"""Dotted paths of modules and tensors in a model; the model's own path is empty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from graphpeft.graph.holders import own_modules


def join(path: str, name: str) -> str:
    """Returns the path of the attribute `name` of the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


def within(path: str, outer: str) -> str:
    """Returns `path` relative to the module at `outer`, which contains it."""
    return path[len(outer) + 1 :] if outer else path


_WRAPPED = {
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""PyTorch's wrappers, which add nothing to what a model computes, and the name of the module in each."""


STATE = "_peft_adapters"
"""The attribute of an adapted model with its adapters."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside of PyTorch's wrappers: those of distributed training, recomputation, compilation.

    A wrapper that was adapted itself is the model: its adapters aren't those of the module inside.
    """
    while (
        STATE not in module.__dict__
        and (name := _WRAPPED.get(type(module).__name__)) in module._modules
        and _is_of_torch(module)
    ):
        inner = module._modules[str(name)]
        assert inner is not None
        module = inner
    return module


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Returns ``dict(model.named_modules())``, without holders and inner wrappers, and faster in deep models."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if path and type(module).__name__ in _WRAPPED:
            module = unwrapped(module)
        if module not in seen:
            seen.add(module)
            found[path] = module
            # most modules have none, or holders alone
            inner = own_modules(module) if module._modules else ()
            if inner:
                waiting += _at_paths(path, inner)
    return found


def all_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields ``model.named_modules(remove_duplicate=False)`` likewise, each module once for each of its paths."""
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if path:
            module = unwrapped(module)
        yield path, module
        waiting += _at_paths(path, own_modules(module))


def paths_inside_wrappers(model: nn.Module) -> dict[str, str]:
    """Returns the paths of modules inside of inner wrappers, by those that ``named_modules`` gives them."""
    own = {module: path for path, module in modules_by_path(model).items()}
    named = {name: own[module] for name, module in model.named_modules() if module in own}
    return {name: path for name, path in named.items() if name != path}


def names_wrapper(text: str) -> bool:
    """Returns whether a name, or a pattern for names, has the attribute of a wrapper in it, such as ``_orig_mod``."""
    return any(name in text for name in _WRAPPED.values() if name.startswith("_"))


def _at_paths(path: str, inner: Sequence[tuple[str, nn.Module | None]]) -> list[tuple[str, nn.Module]]:
    """Returns the modules inside of the one at `path` with their paths, the last first."""
    prefix = f"{path}." if path else ""
    return [(prefix + name, child) for name, child in reversed(inner) if child is not None]
