"""What a trace came to, for a person to read: what it decided, and which modules stay calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from graphpeft.tracing import guards
from graphpeft.tracing.graph_module import Graphs


@dataclass(frozen=True)
class Decision:
    """A decision that the code took on the example, and that each run checks.

    Attributes:
        line: The line of the code that took it, with its file and number.
        taken: What was decided.
        times: At how many places of the graph it is checked.
    """

    line: str
    taken: str
    times: int


@dataclass(frozen=True)
class TraceReport:
    """What a trace came to.

    Attributes:
        nodes: The number of nodes: of the graph, or of those of evaluation and of training.
        decisions: What was decided, in the order of the code.
        kept: The modules that stay calls, with the reason.
        not_kept: The attributes that the model sets, and the graph computes in each run without setting them.
        other_mode_error: Why there is no graph of the other mode, if there should be one.
    """

    nodes: tuple[int, ...]
    decisions: tuple[Decision, ...]
    kept: Mapping[str, str]
    not_kept: tuple[str, ...]
    other_mode_error: str | None

    @classmethod
    def of(
        cls, graphs: Graphs, kept: Mapping[str, str], not_kept: tuple[str, ...], other_mode_error: str | None
    ) -> TraceReport:
        """Returns the report on `graphs`."""
        found: dict[tuple[str, str], int] = {}
        for graph in graphs:
            for node in graph.nodes:
                key = _decision(node)
                if key is not None:
                    found[key] = found.get(key, 0) + 1
        decisions = tuple(Decision(line, taken, times) for (line, taken), times in found.items())
        return cls(tuple(len(graph.nodes) for graph in graphs), decisions, kept, not_kept, other_mode_error)

    def __str__(self) -> str:
        lines = [f"{' and '.join(map(str, self.nodes))} nodes, {len(self.kept)} modules kept as calls"]
        lines += [f"  {path or 'the model'}: {reason}" for path, reason in self.kept.items()]
        if self.not_kept:
            lines.append(f"set by the model and not by the graph: {', '.join(self.not_kept)}")
        if self.other_mode_error is not None:
            lines.append(f"one graph, for the present mode alone: {self.other_mode_error}")
        lines.append(f"{len(self.decisions)} decisions, which each run checks")
        lines += [f"  {decision.line}: {decision.taken}" for decision in self.decisions]
        return "\n".join(lines)


def _decision(node: fx.Node) -> tuple[str, str] | None:
    """Returns the line and the answer of a check."""
    if node.target is guards.expect_present:
        return str(node.args[1]), "given"
    if node.target is guards.expect:
        answer: Any = node.args[1]
        return str(node.args[2]), repr(answer)
    return None
