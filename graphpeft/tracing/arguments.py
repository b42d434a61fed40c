"""Placeholders for the arguments of a traced call, with the names, order and defaults of the forward's parameters."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from graphpeft._torch import pytree
from graphpeft.code.identity_checks import (
    forward_compares_objects,
    is_identity_compared,
    may_be_compared,
    types_told_apart,
)
from graphpeft.graph import guards
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_code import class_of_forward
from graphpeft.graph.template import SIMPLE
from graphpeft.tracing.recorder import Recorder

ExampleCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the example call."""

_EXTRA = None
"""The default of an extra argument: Python requires one, since parameters before it may have defaults."""


class Arguments:
    """Makes the arguments of one traced call."""

    def __init__(self, tracer: Recorder, example: ExampleCall | None) -> None:
        self._tracer = tracer
        self._example = example
        forward = tracer.session.root.forward
        self._signature = inspect.signature(forward)
        self._code: CodeType | None = getattr(inspect.unwrap(forward), "__code__", None)
        self._told_apart = {kind for cls in tracer.session.followed_classes() for kind in types_told_apart(cls)}

    def make(self) -> tuple[list[Any], dict[str, Any]]:
        """Returns positional and keyword arguments: placeholders, or example values that the graph checks in each run.

        Each argument is positional or keyword as in the example call, since decorators can see the difference.
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
        return with_identities(self._tracer, self._tracer.session.root, positional, keywords)

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
        if self._is_compared(example):
            # a proxy for None would make `mask is None` false
            self._tracer.decide(placeholder, example, f"the argument {name!r}")
            return example
        self._tracer.give(placeholder, example)
        return self._tracer.present(placeholder, f"the argument {name!r}")

    def _is_compared(self, example: Any) -> bool:
        """Returns whether code may compare an argument by ``is`` with another object than an argument."""
        return (
            isinstance(example, bool)
            or is_identity_compared(example)
            or may_be_compared(example, self._code)
            or type(example) in self._told_apart
        )


def with_identities(
    tracer: Recorder, module: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the arguments of a module's call, those that are one object as one proxy, if its code asks for that.

    The graph checks which arguments of the model are the same object; without an example, none are.
    """
    known: dict[fx.Node, fx.Proxy] = {}

    def told(value: Any) -> Any:
        if not isinstance(value, fx.Proxy) or value.node.op != "placeholder":
            return value
        example = tracer.examples.given.get(value.node, value)
        if value.node in known or not isinstance(example, torch.Tensor | fx.Proxy):
            return known.get(value.node, value)
        for node, earlier in known.items():
            is_same = example is tracer.examples.given.get(node)
            asked = tracer.create_proxy("call_function", operator.is_, (value, earlier), {})
            name, other = value.node.target, node.target
            tracer.decide(asked, is_same, f"whether the argument {name!r} is {other!r}")
            if is_same:
                return earlier
        known[value.node] = value
        return value

    if not forward_compares_objects(class_of_forward(module)):
        return [*args], {**kwargs}
    return [told(value) for value in args], {name: told(value) for name, value in kwargs.items()}
