"""Traces a forward once, or twice if its code branches on training mode.

``if self.training: …`` is a decision that users change by `train()` and `eval()`, so both branches are traced. If the
forward only passes the mode on, as in ``F.dropout(x, p, self.training)``, one graph serves both modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import fx, nn

from graphpeft.graph import guards
from graphpeft.graph.errors import OUT_OF_MEMORY, NeedsInputsError, TraceError
from graphpeft.graph.template import VALUE, Graphs
from graphpeft.tracing.mode_discovery import modes_after, own_modes


class Recorded(NamedTuple):
    """The graphs of a forward.

    Attributes:
        graphs: One graph for both modes, or the graphs of evaluation and of training.
        other_mode_error: The error of tracing the mode that the module isn't in now, or None.
    """

    graphs: Graphs
    other_mode_error: TraceError | None


def in_each_mode(root: nn.Module, record: Callable[[Mapping[nn.Module, bool] | None], fx.Graph]) -> Recorded:
    """Traces the forward of `root` in its present mode, and also in the other mode if it decides on the mode."""
    graph = record(None)
    decision = _decision_on_training(graph)
    if decision is None:
        return Recorded((graph,), None)
    try:
        other = record(modes_after(root, not root.training, own_modes(root)))
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        # the example inputs may not suit the other mode, which may need larger batches for batch statistics
        mode = "evaluation" if root.training else "training"
        message = f"it takes another way in {mode}, {decision}, which can't be recorded: {error}"
        needs_inputs = isinstance(error, NeedsInputsError)
        return Recorded((graph,), NeedsInputsError(message) if needs_inputs else TraceError(message))
    return Recorded((other, graph) if root.training else (graph, other), None)


def _decision_on_training(graph: fx.Graph) -> str | None:
    """Returns the line of the first decision on a module's mode."""
    for node in graph.nodes:
        if node.target is guards.expect and _comes_from_training(node.args[0]):
            return str(node.args[2])
    return None


def _comes_from_training(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[2] == "training"
    # the mode reaches decisions through flags and numbers only; it changes the values of tensors
    inputs = [source for source in node.all_input_nodes if isinstance(source.meta.get(VALUE), bool | int | float)]
    return any(_comes_from_training(source) for source in inputs)
