"""Rules whose change an operation's own weight may have, so that the operation runs once with W + ΔW."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch.fx as fx

from graphpeft.graph.ops import Computation
from graphpeft.graph.ops.set_forwards import as_set
from graphpeft.graph.tags import changes_at, read_before
from graphpeft.rules.arguments import asked_by
from graphpeft.rules.rule import OperationRule


class AddsToWeight(OperationRule):
    """A rule whose change can be added to the weight by which an operation multiplies.

    Where that is so, ``rewrite`` is given ``apart``: in runs where it holds, the operation's weight is without the
    change, so that ``rewrite`` adds the operation on it, and else the operation's value has it already. Where it's
    never so, ``apart`` is None.
    """

    @abstractmethod
    def adds_to_weight(self, operation: Any) -> bool:
        """Returns whether x (W + ΔW)ᵀ is what an operation gives with its change, at least in evaluation.

        Args:
            operation: The operation.
        """
        ...

    @abstractmethod
    def keeps_apart(self, *args: Any, **kwargs: Any) -> Any:
        """Returns whether a run is to keep W and ΔW apart, as it has to where dropout acts; it runs on proxies.

        Its arguments can be ``apart``, whether the run is to do so anyway; ``training``; and the rule's own parameters
        and constants.
        """
        ...

    @abstractmethod
    def added(self, *args: Any, **kwargs: Any) -> Any:
        """Returns W + ΔW, and W in runs where both are to be ``apart``; it runs on proxies.

        Its arguments can be ``weight``, W; ``apart``; ``change``, ΔW, both as the weight is stored; and the rule's own
        parameters and constants.
        """
        ...


def own_weight(graph: fx.Graph, op: Computation, rule: Any) -> fx.Node | None:
    """Returns the operand of an operation to which a rule's change is to be added, or None."""
    if not isinstance(rule, AddsToWeight) or "apart" not in asked_by(rule.rewrite).names:
        return None
    # a layer's call has no such operand, and a forward that was set on a layer reads its input alone
    if not op.node.op.startswith("call_") or op.node.op == "call_module" or op.node.target is as_set:
        return None
    operands = [node for node in op.node.all_input_nodes if _reads(node, op.weight)]
    if len(operands) != 1 or op.x in operands or not rule.adds_to_weight(op):
        return None
    # what an earlier adapter does to the input, or to the result, is no matter of this change
    added = len(read_before(operands[0])) - 1
    return operands[0] if added == len(changes_at(graph, op.name)) else None


def _reads(node: fx.Node, path: str) -> bool:
    *_, first = read_before(node)
    return first.op == "get_attr" and first.target == path
