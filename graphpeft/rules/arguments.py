"""The values that the functions of a rule ask for, by the names of their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from graphpeft.graph import ops
from graphpeft.rules.rule import Mergeable, Rule, RunsByRow
from graphpeft.sites.site import CallSite, LeafSite

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Asked:
    """The arguments of a rule's function.

    Attributes:
        names: The names of the arguments.
        needed: The names of the arguments without a default.
        takes_more: Whether the function takes ``**others``.
    """

    def __init__(self, function: Callable[..., Any], is_bound: bool = False) -> None:
        parameters = dict(list(inspect.signature(function).parameters.items())[is_bound:])
        self.names = [name for name, parameter in parameters.items() if parameter.kind not in _VARIABLE]
        self.needed = [name for name in self.names if parameters[name].default is inspect.Parameter.empty]
        self.takes_more = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())

    def may_be(self, name: str) -> bool:
        """Returns whether the function gets the value `name`, if it is available."""
        return name in self.names or (self.takes_more and name not in COMPUTED)

    def among(self, there: Iterable[str]) -> list[str]:
        """Returns the names in `there` that the function gets, in the order of its arguments."""
        there = list(dict.fromkeys(there))
        lacking = [name for name in self.needed if name not in there]
        if lacking:
            raise ArgumentError(f"asks for {lacking[0]!r}, and there is {', '.join(sorted(there))}")
        return [name for name in self.names if name in there] + [
            name for name in there if name not in self.names and self.may_be(name)
        ]


def asked_by(function: Callable[..., Any]) -> Asked:
    """Returns the arguments of a rule's function, cached for all rules of a class."""
    own = getattr(function, "__func__", None)
    return _asked(function, False) if own is None else _asked(own, True)


_asked = functools.lru_cache(maxsize=1024)(Asked)


class ArgumentError(TypeError):
    """A function of a rule asks for an unknown name."""


_INPUT = ("x", "operation", "training")
_AT_LEAF = ("y", *_INPUT)
_OPERANDS = ("weight", "base", "bias", "base_bias", "plain")
_AT_OPERATION = (*_AT_LEAF, *_OPERANDS)
CHANGES = ("change", "bias_change")
"""The rule's own changes, which ``rewrite`` can ask for."""

OPTIONAL = (*CHANGES, "apart")
"""The values that ``rewrite`` can ask for, and that are None where there is no such thing."""

COMPUTED = frozenset((*_OPERANDS, *OPTIONAL))
"""The values that are computed only for functions that name them."""

_ENTER, _LEAVE = ("inputs", "training"), ("inputs", "training", "output", "entered")

GIVEN = frozenset((*_AT_OPERATION, *OPTIONAL, *_LEAVE))
"""The names of all values that rules' functions can get besides their own parameters and constants."""


@functools.lru_cache(maxsize=1024)
def unknown_argument(rule: Rule, site: type, op: type, own: tuple[str, ...]) -> str | None:
    """Returns a reason that names a rule's function and the unknown argument that it asks for, or None."""
    functions: dict[str, tuple[str, ...]] = {}
    if issubclass(site, CallSite):
        functions = {"enter": _ENTER, "leave": _LEAVE}
    elif op is not ops.Weight:
        is_leaf = issubclass(site, LeafSite)
        changes = CHANGES if isinstance(rule, Mergeable) and not is_leaf else ()
        functions = {"rewrite": (*(_AT_LEAF if is_leaf else _AT_OPERATION), *changes, "apart"), "enter": _INPUT}
        functions |= {} if is_leaf else {"added": ("weight", "apart", *CHANGES), "keeps_apart": ("apart", "training")}
    if isinstance(rule, Mergeable) and issubclass(site, LeafSite):
        functions["delta"] = ("weight", "base")
    elif isinstance(rule, Mergeable):
        functions |= {"delta": ("weight", "base"), "bias_delta": ("weight", "base", "bias", "base_bias")}
        functions |= {"changed_weight": ("weight", "given", "training")} if op is ops.Weight else {}
    if isinstance(rule, Mergeable) and getattr(rule, "is_product", False):
        handed_on = [name for name in asked_by(rule.delta).names if name in _OPERANDS]
        functions["product"] = ("training", *handed_on)
    if isinstance(rule, RunsByRow):
        functions["by_row"] = (*_AT_LEAF, *rule.constants_by_row)
    functions = {name: (*given, *_of_call(rule, name)) for name, given in functions.items()}
    for name, given in functions.items():
        if not hasattr(rule, name):
            continue
        try:
            asked_by(getattr(rule, name)).among((*given, *own))
        except ArgumentError as error:
            return f"{name} of {type(rule).__name__} {error}"
    return None


def _of_call(rule: Rule, function: str) -> tuple[str, ...]:
    # merging has no call, and so no arguments of a call
    return rule.call_inputs if function in ("rewrite", "enter", "leave") else ()
