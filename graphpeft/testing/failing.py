"""Rules that fail, as the sixth law needs them."""

from __future__ import annotations

import copy
import functools
from typing import Any

from graphpeft.rules.config import PeftConfig


class RuleError(Exception):
    """What the rules raise with which the sixth law fails an adaptation."""


def _fail(*_: Any, **__: Any) -> Any:
    raise RuleError


@functools.cache
def _failing_class(cls: type) -> type:
    """Returns a class of rules that fail as late as they can: when their nodes are inserted."""
    return type(cls.__name__, (cls,), {name: _fail for name in ("rewrite", "delta", "enter") if hasattr(cls, name)})


def _failing_rule(rule: Any) -> Any:
    failing = copy.copy(rule)
    object.__setattr__(failing, "__class__", _failing_class(type(rule)))  # rules are frozen
    return failing


def with_failing_rules(config: PeftConfig) -> PeftConfig:
    """Returns an equal config, whose rules fail with `RuleError` when their nodes are inserted."""
    of_its_class = type(config).rule_for

    # on the class, since the config is copied before it is asked for rules
    class Failing(type(config)):
        def rule_for(self, site: Any, dtype: Any) -> Any:
            return _failing_rule(of_its_class(self, site, dtype))

    failing = copy.deepcopy(config)
    failing.__class__ = Failing
    return failing
