"""Forwards that other code keeps on a module itself, where they win over that of the module's class.

accelerate puts a function of its own there, ``module.forward``, which moves tensors and calls ``module._old_forward``:
the forward of the class as it was then. When hooks are removed, that remains as ``module.forward``. A forward of the
class that is kept so follows each exchange of the class, so a graph runs under the hook. The functions of Transformers'
tensor parallelism are exchanged for others around the present forward (`tensor_parallel.py`).

Any other one is patched: a user or a library has set ``module.forward = new_forward``. If it was there when the module
was adapted, it is known: while the module has a graph, it steps aside for that, which was made of it, and then it
returns.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from graphpeft.graph.hosts.tensor_parallel import around_present, hook_of, is_followed, stood_for
from graphpeft.graph.own_tensors import on_own
from graphpeft.graph.recomputing import taken_along
from graphpeft.transaction import delete_item, set_item

_NAMES = ("forward", "_old_forward")
"""The attributes of a module in which code keeps the forward of its class."""

OF_HOOKS = frozenset({*_NAMES, "_hf_hook"})
"""These attributes, and the one with accelerate's hook, which reads no weight for another module."""

KNOWN = "_graphpeft_patched_forward"
"""The attribute of a module with the patched forward that was there when the module was adapted."""


def has_forward(module: nn.Module) -> bool:
    """Returns whether `module` itself has a forward, under one of the names in which code keeps one."""
    held = vars(module)
    return "forward" in held or "_old_forward" in held


def kept_forwards(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the attributes in which `module` itself has the forward of its class."""
    held = vars(module)
    return tuple([name for name in _NAMES if name in held and _is_own(module, held[name])])


def keep_own_forward(module: nn.Module, names: tuple[str, ...]) -> None:
    """Puts the forward that the class of `module` has now into attributes of the module itself."""
    for name in names:
        vars(module)[name] = types.MethodType(type(module).forward, module)


def newly_patched_forward(module: nn.Module) -> Any | None:
    """Returns the forward that `module` itself has if that may not run what the class has, and isn't known; or None."""
    place = _place_of_patched(module)
    found = None if place is None else vars(module)[place]
    return None if found is vars(module).get(KNOWN) else found


def patched_forward(module: nn.Module) -> Any | None:
    """Returns the patched forward of `module`, a known one even while that has stepped aside; else None."""
    return newly_patched_forward(module) or _known(module)


def _known(module: nn.Module) -> Any | None:
    # without the attributes, somebody has deleted it
    return vars(module).get(KNOWN) if has_forward(module) else None


def name_of(forward: Any) -> str:
    """Returns the name of a function for a person; the representation of a bound one may be that of a whole model."""
    if isinstance(forward, functools.partial):
        return f"partial of {name_of(forward.func)}"
    return getattr(forward, "__qualname__", None) or type(forward).__name__


def know(module: nn.Module) -> None:
    """Lets the patched forward of `module`, if it has one, step aside from now on where the module has a graph."""
    found = newly_patched_forward(module)
    if found is not None:
        set_item(vars(module), KNOWN, found)


def forget(module: nn.Module) -> None:
    """Ends what `know` began, on a module without a graph."""
    delete_item(vars(module), KNOWN)


def follow(module: nn.Module, is_dressed: bool) -> None:
    """Lets a forward of tensor parallelism run around that of another class of `module`, or as it was."""
    forward = vars(module).get("forward")
    if is_dressed and _is_around_own(module, forward):
        vars(module)["forward"] = around_present(module, forward)
    elif not is_dressed and stood_for(forward) is not None:
        vars(module)["forward"] = stood_for(forward)


def _is_around_own(module: nn.Module, forward: Any) -> bool:
    hook = hook_of(forward)
    return hook is not None and is_followed(hook) and _is_own(module, hook.kept)


def step_aside(module: nn.Module) -> None:
    """Puts the forward of the class in the place of a known patched forward."""
    place = _place_of_patched(module)
    if place is not None and vars(module)[place] is vars(module).get(KNOWN):
        keep_own_forward(module, (place,))


def step_back(module: nn.Module) -> None:
    """Puts a known patched forward back into its place."""
    own = kept_forwards(module)
    if own and KNOWN in vars(module):
        # of the two names, accelerate's comes and goes
        vars(module)[own[0]] = vars(module)[KNOWN]


def run_patched_forward(module: nn.Module) -> functools.partial[Any] | None:
    """Returns a function that calls the known patched forward of `module`, or None without one."""
    return None if _known(module) is None else functools.partial(_run, module)


def _run(module: Any, *args: Any, **kwargs: Any) -> Any:
    # the graph around it has the change of the weight
    with taken_along(functools.partial(on_own, module)):
        return module._graphpeft_patched_forward(*args, **kwargs)


def _place_of_patched(module: nn.Module) -> str | None:
    held = vars(module)
    forward = held.get("forward")
    if forward is None or _is_own(module, forward):
        return None
    if stood_for(forward) is not None or _is_around_own(module, forward):
        return None
    # accelerate's, a functools.partial, looks for what it calls in each call
    if getattr(getattr(forward, "func", None), "__module__", None) != "accelerate.hooks" or "_old_forward" not in held:
        return "forward"
    return None if _is_own(module, held["_old_forward"]) else "_old_forward"


def _is_own(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
