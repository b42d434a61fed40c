"""Which node of a graph a frame of its generated code is computing."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import fx, nn

from graphpeft.graph.template import worn_template

GENERATED = "<eval_with_key>"
"""How the names of files begin that generated code is said to be in."""


def running_node(frame: FrameType) -> tuple[nn.Module, fx.Node] | None:
    """Returns the module that runs a graph in a frame, and the node that is computed; None for other code."""
    module: Any = frame.f_locals.get("self")
    if not frame.f_code.co_filename.startswith(GENERATED) or not isinstance(module, nn.Module):
        return None
    template = worn_template(module)
    if template is None:
        return None
    lines: dict[int, int | None] = module._lineno_map or {}  # type: ignore[assignment]
    place = lines.get(frame.f_lineno - frame.f_code.co_firstlineno)
    if place is None:
        return None
    index = template.index(module)
    if ("nodes", index) not in template.facts:
        template.facts["nodes", index] = tuple(template.graphs[index].nodes)
    return module, template.facts["nodes", index][place]
