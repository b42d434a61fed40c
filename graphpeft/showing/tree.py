"""The modules of a model as a tree, in which modules with equal insides are of one kind."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

from torch import nn

from graphpeft.graph.holders import all_parameters
from graphpeft.graph.traced_model import stands_for
from graphpeft.showing.measuring import Costs
from graphpeft.showing.picture import DrawnModule, DrawnSite, DrawnTraining


class Drawn(NamedTuple):
    """What a picture has of one module's forward.

    Attributes:
        graphs: The place of its graphs among the picture's.
        slots: The place of the adapter in each slot.
        sites: The sites in the graphs.
    """

    graphs: int
    slots: dict[int, int]
    sites: list[DrawnSite]


Trained = Mapping[str, list[DrawnTraining]]
"""What adapters train of modules' own tensors, by the path of the module."""


def tree(
    modules: Mapping[str, nn.Module], drawn: Mapping[str, Drawn], trained: Trained, costs: Costs | None = None
) -> DrawnModule:
    """Returns the module at the root, with all that are inside.

    Args:
        modules: The modules by path; the model itself is at "".
        drawn: What there is of their forwards, by path.
        trained: What adapters train of their own tensors.
        costs: What a forward costs; None if that wasn't measured.
    """
    inside: dict[str, list[str]] = {path: [] for path in modules}
    for path in modules:
        if path:
            inside[path.rpartition(".")[0]].append(path)
    kinds: dict[Hashable, int] = {}

    def grown(path: str) -> DrawnModule:
        module = modules[path]
        parts = [grown(part) for part in inside[path]]
        own = drawn.get(path)
        sites = own.sites if own is not None else []
        numbers = sum(parameter.numel() for _, parameter in all_parameters(module))
        shapes = tuple(tuple(parameter.shape) for _, parameter in all_parameters(module))
        graphs, slots = (own.graphs, own.slots) if own is not None else (None, {})
        training = trained.get(path, [])
        acting = (graphs, tuple(slots.items()), tuple(training))
        kind = (stands_for(module), shapes, acting, *((part.name, part.kind) for part in parts))
        return DrawnModule(
            name=path.rpartition(".")[2],
            path=path,
            cls=stands_for(module).__name__,
            parameters=numbers + sum(part.parameters for part in parts),
            adapted=len(sites) + len(training) + sum(part.adapted for part in parts),
            kind=kinds.setdefault(kind, len(kinds)),
            graphs=graphs,
            slots=slots,
            sites=sites,
            trained=training,
            inside=parts,
            kept=None if costs is None or path not in costs.seconds else costs.kept.get(path, 0),
            kept_by={} if costs is None else costs.kept_by_node.get(path, {}),
            shapes={} if costs is None else costs.shapes.get(path, {}),
            seconds=None if costs is None else costs.seconds.get(path),
        )

    return grown("")
