"""Records a forward once, or twice where it goes another way in training than in evaluation.

``if self.training: …`` is a decision that the user changes with `train()` and `eval()`, so its other answer is followed
too. Where the mode is only handed on, as in ``F.dropout(x, p, self.training)``, one graph serves both.
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
    """What there is of a forward.

    Attributes:
        graphs: Its graph, or that of evaluation and that of training.
        other_mode_error: Why there is none of the mode in which the module isn't now, if it should have one.
    """

    graphs: Graphs
    other_mode_error: TraceError | None


def in_each_mode(root: nn.Module, record: Callable[[Mapping[nn.Module, bool] | None], fx.Graph]) -> Recorded:
    """Records the forward of `root` in its mode, and in the other one if it decides on it.

    Args:
        root: The module.
        record: Records `root` as it is (None), or as if its modules were in these modes.
    """
    graph = record(None)
    decision = _decision_on_training(graph)
    if decision is None:
        return Recorded((graph,), None)
    try:
        other = record(modes_after(root, not root.training, own_modes(root)))
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        # what the other mode needs, such as larger batches for its statistics, the example inputs need not have
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
    # beyond flags and numbers, the mode changes values but no decisions
    inputs = [source for source in node.all_input_nodes if isinstance(source.meta.get(VALUE), bool | int | float)]
    return any(_comes_from_training(source) for source in inputs)
