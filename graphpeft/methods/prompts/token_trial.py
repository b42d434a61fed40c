"""A trial on a copy of a graph: whether a model runs with another token in some of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphpeft._torch import pytree
from graphpeft.graph.calls import Call
from graphpeft.graph.copied_graphs import copy_graph
from graphpeft.graph.errors import OUT_OF_MEMORY
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.ops.boundaries import boundary_of
from graphpeft.methods.prompts.example_values import Ran, run
from graphpeft.methods.prompts.in_scope import InScope
from graphpeft.rules import rewrite
from graphpeft.rules.rule import BoundaryRule


@dataclass(frozen=True)
class _OneToken(BoundaryRule):
    """The rule that puts one virtual token of zeros into a scope."""

    scope: InScope
    dim: int

    def parameters(self, site: Any, config: Any) -> dict[str, Any]:
        return {}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        return None

    def enter(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self.scope.enter(inputs[self.scope.sequence].new_zeros(1, self.dim), inputs, None, None)

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        return self.scope.leave(output, inputs, entered)


def error_with_a_token(ran: Ran, calls: list[Call], example_inputs: ExampleInputs) -> str | None:
    """Returns why a model can't run with another token in each of some modules, or None.

    Args:
        ran: The model's graph.
        calls: The calls of the modules.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
    """
    sizes = sorted({ran.given(call).shape[2] for call in calls})
    if len(sizes) > 1:
        return f"their tokens have several sizes: {', '.join(map(str, sizes))}"
    graph = copy_graph(ran.graph)
    try:
        for call in calls:
            rule = _OneToken(InScope(1, "before", next(iter(call.arguments))), sizes[0])
            rewrite.insert(graph, boundary_of(graph, call.name), rule, {}, slot=0, method="trial")
        found = run(ran.root, graph, example_inputs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        # whatever the model's code raises
        return str(error).strip().partition("\n")[0]
    return None if _shapes(found) == _shapes(ran) else "the model returns values of other shapes"


def _shapes(ran: Ran) -> list[Any]:
    returned = ran.values[ran.graph.output_node().name]
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(returned)]
