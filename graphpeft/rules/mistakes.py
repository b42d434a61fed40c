"""Checks for a rule author's mistakes: contradictions in a rule, or between a rule and the kind of its site."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from graphpeft.graph import ops
from graphpeft.rules.arguments import GIVEN
from graphpeft.rules.delta_rule import WeightRule
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import (
    BoundaryRule,
    InputRule,
    Mergeable,
    OperationRule,
    Rule,
    RunsByRow,
)
from graphpeft.sites.site import CallSite


@functools.lru_cache(maxsize=1024)
def unfit_bases(rule: type, site: type, op: type) -> str | None:
    """Returns why a rule would do nothing at a site, or None."""
    if issubclass(site, CallSite):
        needed: tuple[type, ...] = (BoundaryRule,)
    elif op is ops.Weight:
        needed = (Mergeable,)
    else:
        needed = (OperationRule, InputRule)
    if issubclass(rule, WeightRule) and "__init__" in vars(rule) and "__dataclass_params__" not in vars(rule):
        return f"{rule.__name__} has an __init__ of its own; make it a dataclass with frozen=True"
    if issubclass(rule, needed):
        return None
    names = " or ".join(base.__name__ for base in needed)
    hint = "; a rule that is no more than a change of a weight is a DeltaRule" if issubclass(rule, Mergeable) else ""
    return f"{rule.__name__} would do nothing at a {op.__name__}, where a rule is an {names}{hint}"


def contradiction(specs: Mapping[str, ParameterSpec], constants: Iterable[str]) -> str | None:
    """Returns a contradiction in a rule's parameters and constants, or None."""
    named = [name for name in (*specs, *constants) if name in GIVEN]
    if named:
        return f"{named[0]} is what rules are given by this name; call the rule's own otherwise"
    keys = [spec.key for spec in specs.values() if spec.is_saved]
    if len(set(keys)) < len(keys):
        return f"{max(keys, key=keys.count)} is the name of two parameters in files"
    paths = [spec.path or name for name, spec in specs.items()]
    for path in paths:
        inside = [other for other in paths if other.startswith(f"{path}.")]
        if inside or paths.count(path) > 1:
            return f"{path} is the path of a parameter, and there is another one at it or inside"
    reasons = [_in_spec(name, spec) for name, spec in specs.items()]
    return next(filter(None, reasons), None)


def _in_spec(name: str, spec: ParameterSpec) -> str | None:
    if spec.written_once and spec.scope is None:
        return f"{name} is written once, and has no scope, by which its sites would be known"
    if spec.written_once and not spec.is_saved:
        return f"{name} is written once, and isn't saved"
    if spec.copied and not spec.written_once:
        return f"{name} is copied, and isn't written once"
    if spec.is_trained and not spec.is_saved:
        return f"{name} is trained, and isn't saved"
    if spec.is_trained and spec.dtype is not None and not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return f"{name} is trained, and has whole numbers ({spec.dtype})"
    return None


_BASES: dict[str, tuple[type, ...]] = {
    "rewrite": (OperationRule,),
    "enter": (InputRule, BoundaryRule),
    "leave": (BoundaryRule,),
    "delta": (Mergeable,),
    "bias_delta": (Mergeable,),
    "by_row": (RunsByRow,),
}
"""The base classes without which a rule's function would never be called, by function."""


@functools.lru_cache(maxsize=256)
def lacking_base(rule: type) -> str | None:
    """Returns why a class is no rule, or has a function that would never be called; else None."""
    if not issubclass(rule, Rule):
        return f"{rule.__name__} is no rule; let it inherit from OperationRule, InputRule or BoundaryRule"
    for name, bases in _BASES.items():
        if hasattr(rule, name) and not issubclass(rule, bases):
            return f"{rule.__name__} has {name} and isn't {bases[0].__name__}; let it inherit from that"
    return None
