"""Forwards that other code keeps on a module itself, where they win over that of the module's class.

accelerate puts a function of its own there, ``module.forward``, which moves tensors and calls ``module._old_forward``:
the forward of the class as it was then. When hooks are removed, that remains as ``module.forward``. A forward of the
class that is kept so follows each exchange of the class, so a graph runs under the hook. Any other one is foreign.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

_NAMES = ("forward", "_old_forward")
"""The attributes of a module in which code keeps the forward of its class."""

OF_HOOKS = frozenset({*_NAMES, "_hf_hook"})
"""Those, and the attribute with accelerate's hook, which reads no weight for another module."""


def own_forwards(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the attributes in which `module` itself has the forward of its class."""
    held = vars(module)
    return tuple([name for name in _NAMES if name in held and _is_own(module, held[name])])


def keep_own_forward(module: nn.Module, names: tuple[str, ...]) -> None:
    """Puts the forward that the class of `module` has now into attributes of the module itself."""
    for name in names:
        vars(module)[name] = types.MethodType(type(module).forward, module)


def foreign_forward(module: nn.Module) -> Any | None:
    """Returns the forward that `module` itself has if that may not run what the class has; else None."""
    held = vars(module)
    forward = held.get("forward")
    if forward is None or _is_own(module, forward):
        return None
    # accelerate's, a functools.partial, looks for what it calls in each call
    hooks = getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
    return None if hooks and _is_own(module, held.get("_old_forward")) else forward


def _is_own(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
