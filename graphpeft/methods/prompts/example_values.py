"""The values of a graph's nodes for example inputs, as fake tensors, which take no memory."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from graphpeft._torch import fake_tensor
from graphpeft.graph.calls import Call
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.tracing.examples import faked
from graphpeft.tracing.random_numbers import random_python_states_kept


class Ran(NamedTuple):
    """A graph with the values of its nodes for example inputs, as fake tensors.

    Attributes:
        root: The module that owns the graph.
        graph: The graph.
        values: The value of each node, by the node's name.
    """

    root: nn.Module
    graph: fx.Graph
    values: Mapping[str, Any]

    def given(self, call: Call) -> Any:
        """Returns the first argument of a call, or None if it isn't known."""
        return self.values.get(next(iter(call.arguments.values()), None) or "")

    def returned(self, call: Call) -> Any:
        """Returns the first value that a call returned, or None if it isn't known."""
        return self.values.get(next(iter(call.returned), None) or "")


def run(root: nn.Module, graph: fx.Graph, example_inputs: ExampleInputs) -> Ran:
    """Runs a graph on fake tensors like its example inputs, which may raise anything that the model's code raises."""
    args, kwargs = split_inputs(example_inputs)
    bound = inspect.signature(root.forward).bind(*(args or ()), **kwargs)
    bound.apply_defaults()
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[str, Any] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    given = [faked(value, mode.from_tensor) for value in bound.arguments.values()]
    with mode, random_python_states_kept(), _quiet_fake_tensors():
        Noting(root, garbage_collect_values=False, graph=graph).run(*given)
    return Ran(root, graph, values)


@contextlib.contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Keeps fake tensors from logging what they raise, which is an answer here."""
    logger = logging.getLogger(fake_tensor.__name__)
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def is_sequence(value: Any) -> bool:
    """Returns whether a value may be a token sequence, (batch, tokens, dim)."""
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()
