"""A picture as plain data: a model's modules as a tree, their graphs without and with adapters, and who adapts what.

The page that draws it knows nothing else. All of it can be written as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DrawnNode:
    """A node of a graph.

    Attributes:
        name: Its name, which no other node of the graph has.
        op: Its kind, as torch.fx calls it.
        label: A short text for it.
        arguments: Its arguments as text.
        inputs: The names of the nodes that it reads.
        value: The shape and dtype of its value in the trace; "" where none was kept.
        line: The line of code that made it; "" where that isn't known.
        calls: The calls of modules around it, outermost first: names that no other call in the graph has.
        module: The path of the module that it calls, or of the tensor that it reads, in the graph's module; or "".
        checks: The decisions of the trace that are checked on its value.
        slot: The slot of the adapter that it belongs to; None for a node of the base model.
        site: The name of the operation that its adapter adapts.
        rule: The rule that made it.
        over: The name of the node in whose place it stands.
        rewrite: The name of the rewrite that made it.
    """

    name: str
    op: str
    label: str
    arguments: str
    inputs: list[str]
    value: str = ""
    line: str = ""
    calls: list[str] = field(default_factory=list)
    module: str = ""
    checks: list[str] = field(default_factory=list)
    slot: int | None = None
    site: str = ""
    rule: str = ""
    over: str = ""
    rewrite: str = ""


@dataclass(frozen=True)
class DrawnGraph:
    """A graph of a forward without adapters and rewrites, and the same with them.

    Attributes:
        mode: The mode in which it runs, or "" if it runs in both.
        before: The nodes without adapters and rewrites.
        after: The nodes with them; those of the base model have the names that they have in `before`.
    """

    mode: str
    before: list[DrawnNode]
    after: list[DrawnNode]


@dataclass(frozen=True)
class DrawnTensor:
    """A tensor of an adapter.

    Attributes:
        name: Its name for the rule.
        path: Its path in the graph's module.
        shape: Its shape and dtype.
        trained: Whether it is trained.
        gradient: The norm of its gradient; None without one.
    """

    name: str
    path: str
    shape: str
    trained: bool
    gradient: float | None = None


@dataclass(frozen=True)
class DrawnSite:
    """A site of an adapter in one graph.

    Attributes:
        label: The site's name.
        op: The kind of its operations.
        size: Its features.
        adapter: The place of its adapter among the picture's adapters.
        nodes: The names of its operations.
        rule: The rule with its options.
        tensors: The adapter's tensors there.
        change: ‖ΔW‖ / ‖W‖; None where the adapter changes no weight, or that wasn't computed.
        merges: Why its change can't be merged; "" if it can.
    """

    label: str
    op: str
    size: str
    adapter: int
    nodes: list[str]
    rule: str
    tensors: list[DrawnTensor]
    change: float | None = None
    merges: str = ""


@dataclass(frozen=True)
class DrawnTraining:
    """Tensors of a module that an adapter trains fully, or of which it trains rows.

    Attributes:
        adapter: The place of the adapter among the picture's.
        tensors: Their names.
    """

    adapter: int
    tensors: str


@dataclass(frozen=True)
class DrawnModule:
    """A module.

    Attributes:
        name: Its name in the module around it.
        path: Its path in the model.
        cls: The name of its class.
        parameters: The number of its parameters, adapters' among them.
        adapted: The number of sites in it and in what is inside.
        kind: A number that modules share whose insides are equal.
        graphs: The place of its graphs among the picture's; None if it runs its own code.
        slots: The place of the adapter in each slot of its graphs.
        sites: The sites in its graphs.
        trained: Its own tensors that adapters train.
        inside: The modules inside.
        kept: The bytes that a call keeps for the backward, with what is inside; None if that wasn't measured.
        kept_by: The bytes that the nodes of its graphs keep, by their names.
        shapes: The shapes and dtypes of the values of nodes that have none in the graph, by their names.
        seconds: The time of a forward, with what is inside; None if that wasn't measured.
    """

    name: str
    path: str
    cls: str
    parameters: int
    adapted: int
    kind: int
    graphs: int | None
    slots: dict[int, int]
    sites: list[DrawnSite]
    trained: list[DrawnTraining]
    inside: list[DrawnModule]
    kept: int | None = None
    kept_by: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class DrawnAdapter:
    """An adapter.

    Attributes:
        name: Its name.
        method: Its method.
        options: The options of its config that aren't the defaults, as text.
        state: Whether it acts, rests or is merged.
        sites: The number of its sites.
        parameters: The number of its parameters, with what it trains of the model's own tensors.
    """

    name: str
    method: str
    options: str
    state: str
    sites: int
    parameters: int


@dataclass(frozen=True)
class DrawnRefusal:
    """A name that can't be adapted, with the reason and the way out."""

    name: str
    reason: str
    way_out: str


@dataclass(frozen=True)
class Picture:
    """A picture of a model, for `page`.

    Attributes:
        title: The name of its subject.
        model: The modules.
        graphs: The graphs of modules, for each mode; equal modules share them.
        adapters: The adapters.
        refused: The names that can't be adapted.
        skipped: The names that a config leaves out.
        remark: A sentence on all measured costs; empty if there is none.
    """

    title: str
    model: DrawnModule
    graphs: list[list[DrawnGraph]]
    adapters: list[DrawnAdapter]
    refused: Sequence[DrawnRefusal] = ()
    skipped: Sequence[str] = ()
    remark: str = ""

    def to_json(self) -> str:
        """Returns the picture as JSON, without what is empty."""
        content = dataclasses.asdict(self, dict_factory=_filled)
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _filled(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: _writable(value) for name, value in items if value not in (None, "", [], {}, ())}


def _writable(value: Any) -> Any:
    """Returns a value as JSON can hold it: of the numbers that JSON lacks, the names that JavaScript reads."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
