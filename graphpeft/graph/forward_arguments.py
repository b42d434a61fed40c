"""A function that has a forward's arguments in its code, and calls the forward of its model's class.

Libraries unwrap a decorated forward: torch.fx counts the arguments of the innermost function, and accelerate sets that
function as the model's forward. The function here serves both: its arguments are the own forward's, and a call of it
runs the adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def leading_to_class(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function with the arguments and defaults of `forward` that calls the forward of its model's class."""
    own: Any = inspect.unwrap(forward)
    code = own.__code__
    model, *names = code.co_varnames[: code.co_argcount]
    by_name = list(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
    further = iter(code.co_varnames[code.co_argcount + code.co_kwonlyargcount :])
    rest = next(further) if code.co_flags & inspect.CO_VARARGS else ""
    more = next(further) if code.co_flags & inspect.CO_VARKEYWORDS else ""
    declared = [model, *names, *([f"*{rest}"] if rest else ["*"] if by_name else []), *by_name]
    declared += [f"**{more}"] if more else []
    given = ", ".join(f"{name!r}: {name}" for name in (*names, *by_name))
    passed = f"{model}, {{{given}}}, {rest or '()'}, {more or '{}'}"
    made: dict[str, Any] = {"pass_on": _passing_on(names if rest else [], own)}
    exec(f"def forward({', '.join(declared)}):\n    return pass_on({passed})\n", made)
    made["forward"].__defaults__, made["forward"].__kwdefaults__ = own.__defaults__, own.__kwdefaults__
    made["forward"].__signature__ = inspect.signature(forward)
    return made["forward"]


def _passing_on(positional: list[str], own: Any) -> Callable[..., Any]:
    """Returns a function that passes on what a caller has given, and leaves defaults to the forward itself."""
    parameters = inspect.signature(own, follow_wrapped=False).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}

    def pass_on(model: Any, given: dict[str, Any], rest: tuple[Any, ...], more: Mapping[str, Any]) -> Any:
        first = [given.pop(name) for name in positional]
        named = {name: value for name, value in given.items() if name not in defaults or value is not defaults[name]}
        return type(model).forward(model, *first, *rest, **named, **more)

    return pass_on
