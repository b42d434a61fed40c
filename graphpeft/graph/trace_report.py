"""A printable report on a trace: the branches it took, and the modules that stay calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from graphpeft.graph import guards
from graphpeft.graph.settings import Reads
from graphpeft.graph.template import Graphs
from graphpeft.wording import as_html, number_of


@dataclass(frozen=True)
class Decision:
    """A decision of the code on the example values, which each run checks.

    Attributes:
        line: The line of code that decided, with its file and number.
        taken: The value in the trace, as text.
        times: The number of checks in the graph.
    """

    line: str
    taken: str
    times: int


@dataclass(frozen=True)
class TraceReport:
    """The result of a trace.

    Attributes:
        nodes: The number of nodes of the graph, or of the graphs for evaluation and for training.
        decisions: The decisions, in the order of the code.
        kept: The reason for each module that stays a call, by path.
        not_kept: The attributes that the model sets; the graph computes them in each run without setting them.
        other_mode_error: Why there is no graph for the other mode, if there should be one.
        settings: The module attributes that are constants of a graph, with their values; each run checks them.
        numbers: The paths of the module numbers that a graph computes with; each run reads them.
        read_once: The containers and objects of modules that the trace has read and the graph doesn't read again.
        frozen: The globals and closure variables that are constants of the graph, with their values.
    """

    nodes: tuple[int, ...]
    decisions: tuple[Decision, ...]
    kept: Mapping[str, str]
    not_kept: tuple[str, ...]
    other_mode_error: str | None
    settings: Mapping[str, Any]
    numbers: tuple[str, ...]
    read_once: tuple[str, ...]
    frozen: tuple[str, ...]

    @classmethod
    def of(
        cls,
        graphs: Graphs,
        kept: Mapping[str, str],
        not_kept: tuple[str, ...],
        other_mode_error: str | None,
        reads: Iterable[Reads],
        read_once: tuple[str, ...],
        frozen: tuple[str, ...],
    ) -> TraceReport:
        """Returns the report on `graphs`; `reads` has one entry for each graph, other arguments are attributes."""
        found: dict[tuple[str, str], int] = {}
        for graph in graphs:
            for node in graph.nodes:
                key = _decision(node)
                if key is not None:
                    found[key] = found.get(key, 0) + 1
        decisions = tuple(Decision(line, taken, times) for (line, taken), times in found.items())
        reads = list(reads)
        settings = {setting.path: setting.value for read in reads for setting in read.settings}
        numbers = tuple(dict.fromkeys(path for read in reads for path in read.numbers))
        sizes = tuple(len(graph.nodes) for graph in graphs)
        return cls(sizes, decisions, kept, not_kept, other_mode_error, settings, numbers, read_once, frozen)

    def __str__(self) -> str:
        kept = number_of(len(self.kept), "module kept as a call", "modules kept as calls")
        lines = [f"{' and '.join(map(str, self.nodes))} nodes, {kept}"]
        lines += [f"  {path or 'the model'}: {reason}" for path, reason in self.kept.items()]
        if self.not_kept:
            lines.append(f"set by the model and not by the graph: {', '.join(self.not_kept)}")
        if self.other_mode_error is not None:
            lines.append(f"one graph, for the present mode alone: {self.other_mode_error}")
        lines.append(f"{number_of(len(self.decisions), 'decision')}, which each run checks")
        lines += [f"  {decision.line}: {decision.taken}" for decision in self.decisions]
        if self.numbers:
            lines.append(f"{number_of(len(self.numbers), 'number')} of modules, which each run reads")
            lines += _by_name((path, "") for path in self.numbers)
        if self.settings:
            lines.append(f"{number_of(len(self.settings), 'setting')} of modules, which each run checks")
            lines += _by_name((path, f": {value!r}") for path, value in self.settings.items())
        if self.read_once:
            lines.append(f"read once, and followed no more: {', '.join(self.read_once)}")
        if self.frozen:
            lines.append(f"frozen: {', '.join(self.frozen)}")
        return "\n".join(lines)

    _repr_html_ = as_html


def _by_name(attributes: Iterable[tuple[str, str]]) -> list[str]:
    """Returns one line for each name and value, since a model has many equal modules."""
    places: dict[tuple[str, str], list[str]] = {}
    for path, value in attributes:
        places.setdefault((path.rpartition(".")[2], value), []).append(path)
    return [f"  {paths[0]}{_more(paths)}{value}" for (_, value), paths in places.items()]


def _more(paths: list[str]) -> str:
    return f" and {len(paths) - 1} more of this name" if len(paths) > 1 else ""


def _decision(node: fx.Node) -> tuple[str, str] | None:
    """Returns the line and the value of a check, or None for another node."""
    if node.target is guards.expect_present:
        return str(node.args[1]), "given"
    if node.target is guards.expect_number:
        return str(node.args[1]), "a number"
    if node.target is guards.expect:
        answer: Any = node.args[1]
        return str(node.args[2]), repr(answer)
    return None
