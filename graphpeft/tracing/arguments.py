"""Placeholders for the arguments of a traced call, with the names, order and defaults of the forward's parameters."""

from __future__ import annotations

import inspect
import operator
from types import CodeType
from typing import Any

import torch
import torch.fx as fx

from graphpeft._torch import pytree
from graphpeft.code.identity_checks import compares_objects, is_identity_compared, may_be_compared
from graphpeft.graph import guards
from graphpeft.graph.errors import TraceError
from graphpeft.graph.template import SIMPLE
from graphpeft.tracing.recorder import Recorder

ExampleCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the example call."""

_EXTRA = None
"""The default of an extra argument: Python requires one, since parameters before it may have defaults."""


class Arguments:
    """Makes the arguments of one traced call.

    Args:
        tracer: The tracer.
        example: The arguments of the example call, or None to trace without example values.
    """

    def __init__(self, tracer: Recorder, example: ExampleCall | None) -> None:
        self._tracer = tracer
        self._example = example
        self._compared: dict[str, tuple[fx.Proxy, Any]] = {}
        forward = tracer.session.root.forward
        self._signature = inspect.signature(forward)
        self._code: CodeType | None = getattr(inspect.unwrap(forward), "__code__", None)

    def make(self) -> tuple[list[Any], dict[str, Any]]:
        """Returns positional and keyword arguments: placeholders, or example values that the graph checks in each run.

        Each argument is positional or keyword as in the example call, since decorators can see the difference.

        Raises:
            TraceError: If the example doesn't fit the forward's signature, or generated code can't hold a default.
        """
        bound, by_name = self._bound()
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                given = bound.get(name, ())
                positional += [self._argument(f"{name}_{i}", _EXTRA, value) for i, value in enumerate(given)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                given = bound.get(name, {})
                keywords |= {key: self._argument(key, _EXTRA, value) for key, value in given.items()}
            else:
                value = self._argument(name, parameter.default, bound.get(name, parameter.default))
                if name in by_name:
                    keywords[name] = value
                elif isinstance(value, fx.Proxy) and self._stays_open(parameter):
                    guards.expect_number(value, f"the argument {name!r}")
                    keywords[name] = value
                elif name in bound or (self._example is None and parameter.default is parameter.empty):
                    positional.append(value)
                elif isinstance(value, fx.Proxy):
                    # the example omits this argument, so the forward runs with the default
                    self._tracer.decide(value, parameter.default, f"the argument {name!r}")
        return positional, keywords

    def _stays_open(self, parameter: inspect.Parameter) -> bool:
        """Returns whether a default is recorded as if it were given, so that other numbers can be, too.

        That needs no example call, which could be without it, and a forward that can't tell the difference: decorators
        and hooks can. A whole number may say which operation it is, as a stride or a dimension, and is to be known.
        """
        root = self._tracer.session.root
        return (
            self._example is None
            and isinstance(parameter.default, float | complex)
            and parameter.kind is not parameter.POSITIONAL_ONLY
            and not hasattr(root.forward, "__wrapped__")
            and not (root._forward_pre_hooks_with_kwargs or root._forward_hooks_with_kwargs)
        )

    def _bound(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns all example arguments by parameter name, and the keyword arguments of the example."""
        if self._example is None:
            return {}, {}
        args, kwargs = self._example
        try:
            return self._signature.bind(*args, **kwargs).arguments, kwargs
        except TypeError as error:
            kind = type(self._tracer.session.root).__name__
            raise TraceError(f"example_inputs don't fit {kind}'s forward: {error}") from error

    def _argument(self, name: str, default: Any, example: Any) -> Any:
        defaults = () if default is inspect.Parameter.empty else (default,)
        if not all(isinstance(leaf, SIMPLE) for leaf in pytree.tree_leaves(list(defaults))):
            raise TraceError(f"the default of the argument {name!r} is {default!r}, which generated code can't hold")
        placeholder = self._tracer.create_proxy("placeholder", name, defaults, {})
        if example is inspect.Parameter.empty:
            return self._tracer.present(placeholder, f"the argument {name!r}")
        if isinstance(example, bool) or is_identity_compared(example) or may_be_compared(example, self._code):
            # a proxy for None would make `mask is None` false
            self._tracer.decide(placeholder, example, f"the argument {name!r}")
            return example
        self._tracer.give(placeholder, example)
        self._tracer.present(placeholder, f"the argument {name!r}")
        is_compared = isinstance(example, torch.Tensor) and self._code is not None and compares_objects(self._code)
        return self._with_identity_checks(name, placeholder, example) if is_compared else placeholder

    def _with_identity_checks(self, name: str, placeholder: fx.Proxy, example: Any) -> fx.Proxy:
        """Adds checks to the graph: whether an argument is the same object as an earlier argument, as in the example.

        Returns the earlier argument's placeholder if both are the same object.
        """
        for earlier_name, (earlier, other) in self._compared.items():
            asked = self._tracer.create_proxy("call_function", operator.is_, (placeholder, earlier), {})
            self._tracer.decide(asked, example is other, f"whether the argument {name!r} is {earlier_name!r}")
            if example is other:
                return earlier
        self._compared[name] = (placeholder, example)
        return placeholder
