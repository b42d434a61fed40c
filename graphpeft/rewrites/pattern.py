"""Patterns: functions in plain PyTorch, whose arguments stand for any values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError as ProxyError

from graphpeft.peft_errors import PeftError
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.values import Form


class RewriteError(PeftError, ValueError):
    """A rewrite can't be made; the model is as it was.

    Examples:
        >>> try:
        ...     Rewrite(lambda x: F.silu(x), lambda x: F.relu(x))(nn.Sequential(nn.GELU()))
        ... except RewriteError as error:
        ...     print(str(error).partition(";")[0])
        0 matches, and not at least one
    """


class layer:  # noqa: N801 - reads as a function, and has to be recognised
    """A module of some class, whose call is one operation of a pattern.

    In a pattern, its call stands for the call of any such module. In the replacement, it calls the module that was
    found.

    Args:
        classes: The classes of the module; without any, any module.

    Examples:
        >>> branch = layer(nn.Linear)
        >>> halved = Rewrite(lambda x: x + branch(x), lambda x: x + 0.5 * branch(x))
        >>> halved.find(trace(nn.Sequential(nn.Linear(4, 4)))).matches
        ()
    """

    def __init__(self, *classes: type[nn.Module]) -> None:
        self.classes = classes or (nn.Module,)
        self.__name__ = " or ".join(cls.__name__ for cls in self.classes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Records a call of the module.

        Args:
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.

        Returns:
            The value of the call, for the code of the pattern or of the replacement.

        Raises:
            TypeError: Outside of a pattern and a replacement.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", self, args, kwargs)
        raise TypeError(f"layer({self.__name__}) is called in patterns and in replacements")


class either:  # noqa: N801 - as above
    """Patterns one of which has to match; the first one that does counts.

    It stands for a pattern, or is called inside one.

    Args:
        patterns: Functions. Each has arguments of its own. In the replacement, an argument that the matching one lacks
            has its default.

    Raises:
        TypeError: If there are fewer than two.

    Examples:
        >>> square = either(lambda x: x * x, lambda x: x**2)
        >>> Rewrite(lambda x: square(x).mean(), lambda x: x.var(correction=0)).alternatives
        2
    """

    def __init__(self, *patterns: Callable[..., Any]) -> None:
        if len(patterns) < 2:
            raise TypeError("either takes two patterns or more")
        self.patterns = patterns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls one of the patterns: the one that is tried at present, or outside of a pattern the first.

        Args:
            args: The positional arguments of the pattern.
            kwargs: The keyword arguments of the pattern.

        Returns:
            Its value, for the code of the pattern around.

        Raises:
            TypeError: If that pattern takes other arguments.
        """
        choices = _CHOICES.get()
        chosen = choices.next(len(self.patterns)) if choices is not None else 0
        return self.patterns[chosen](*args, **kwargs)


class _Choices:
    """Counts through all choices among alternatives, as the digits of a number."""

    def __init__(self) -> None:
        self._digits: list[int] = []
        self._sizes: list[int] = []
        self._place = 0

    def next(self, size: int) -> int:
        """Returns the present choice among `size` alternatives."""
        if self._place == len(self._digits):
            self._digits.append(0)
            self._sizes.append(size)
        self._place += 1
        return self._digits[self._place - 1]

    def advance(self) -> bool:
        """Goes to the next choices, and returns whether there are any."""
        self._place = 0
        while self._digits and self._digits[-1] + 1 == self._sizes[-1]:
            self._digits.pop()
            self._sizes.pop()
        if self._digits:
            self._digits[-1] += 1
        return bool(self._digits)


_CHOICES: ContextVar[_Choices | None] = ContextVar("choices", default=None)
"""The choices of the pattern that is being read in this thread."""


class Alternative(NamedTuple):
    """One way in which a pattern can be met.

    Attributes:
        result: The node of the value that is replaced.
        open: The nodes of the arguments, by name.
        constants: The names of the arguments for constants alone.
        reader: Reads the nodes.
        size: The number of operations.
    """

    result: fx.Node
    open: dict[str, fx.Node]
    constants: frozenset[str]
    reader: Reader
    size: int

    def form(self, node: fx.Node) -> Form:
        """Returns an operation of the pattern in its one form."""
        return self.reader.forms(node)[0]


def alternatives_of(pattern: Callable[..., Any]) -> tuple[Alternative, ...]:
    """Returns the ways in which a pattern can be met, in the order in which they are tried."""
    patterns = pattern.patterns if isinstance(pattern, either) else (pattern,)
    return tuple(alternative for each in patterns for alternative in _readings(each))


def _readings(pattern: Callable[..., Any]) -> Iterator[Alternative]:
    choices, is_more = _Choices(), True
    while is_more:
        token = _CHOICES.set(choices)
        try:
            alternative = _read(pattern)
        finally:
            _CHOICES.reset(token)
        yield alternative
        is_more = choices.advance()


class _Tracer(fx.Tracer):
    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            raise RewriteError(
                f"the pattern computes with a tensor of shape {tuple(a.shape)} of its own; make it an argument"
            )
        return super().create_arg(a)


def _read(pattern: Callable[..., Any]) -> Alternative:
    parameters = inspect.signature(pattern).parameters
    kinds = {each.kind for each in parameters.values()}
    if not kinds.isdisjoint((inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)):
        raise RewriteError("a pattern names its arguments; it can't have *args or **kwargs")
    graph, tracer = fx.Graph(), _Tracer()
    tracer.graph, tracer.root = graph, nn.Module()
    nodes = {name: graph.placeholder(name) for name in parameters}
    given = {name: fx.Proxy(node, tracer) for name, node in nodes.items()}
    of_constants = frozenset(name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY)
    by_name = {name: given[name] for name in of_constants}
    try:
        result = pattern(*(given[name] for name in parameters if name not in of_constants), **by_name)
    except (ProxyError, RuntimeError) as error:
        raise RewriteError(
            f"the pattern can't be read, since its arguments have no values yet: {error}; write a pattern for each "
            "case, and join them by either()"
        ) from error
    if not isinstance(result, fx.Proxy) or result.node.op == "placeholder":
        what = "an argument" if isinstance(result, fx.Proxy) else f"a {type(result).__name__}"
        raise RewriteError(f"a pattern returns one value that it computes, and this one returns {what}")
    graph.output(result.node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    unused = [name for name, node in nodes.items() if not node.users]
    if unused:
        raise RewriteError(f"the pattern doesn't use its argument {unused[0]}")
    size = sum(node.op not in ("placeholder", "output") for node in graph.nodes)
    return Alternative(result.node, nodes, of_constants, Reader(graph, None, False), size)
