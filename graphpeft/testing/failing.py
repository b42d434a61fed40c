"""Rules that fail, for the sixth law."""

from __future__ import annotations

import copy
import functools
from typing import Any

from graphpeft.rules.config import PeftConfig


class RuleError(Exception):
    """The error of rules that fail on purpose."""


def _failing(function: Any) -> Any:
    """Returns a function that asks for the same arguments, and fails."""

    @functools.wraps(function)
    def fail(*_: Any, **__: Any) -> Any:
        raise RuleError

    return fail


@functools.cache
def _failing_class(cls: type) -> type:
    """Returns a class of rules that fail as late as possible: when their nodes are inserted."""
    names = ("rewrite", "delta", "changed_weight", "enter")
    return type(cls.__name__, (cls,), {name: _failing(getattr(cls, name)) for name in names if hasattr(cls, name)})


def _failing_rule(rule: Any) -> Any:
    failing = copy.copy(rule)
    object.__setattr__(failing, "__class__", _failing_class(type(rule)))  # rules are frozen
    return failing


def with_failing_rules(config: PeftConfig) -> PeftConfig:
    """Returns an equal config, whose rules fail with `RuleError` when their nodes are inserted."""
    of_its_class = type(config).rule_for

    # on the class, since the config is copied before rule_for is called
    class Failing(type(config)):
        def rule_for(self, site: Any, dtype: Any) -> Any:
            return _failing_rule(of_its_class(self, site, dtype))

    failing = copy.deepcopy(config)
    failing.__class__ = Failing
    return failing
