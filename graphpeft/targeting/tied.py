"""Layers that have the table of an embedding as their weight: the very tensor, as an output head may."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphpeft.graph.traced_model import stands_for


def tied_layers(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Returns, by the path of an embedding, the paths of the other modules whose weight is its own tensor."""
    by_weight: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            by_weight.setdefault(id(weight), []).append(path)
    found: dict[str, list[str]] = {}
    for paths in by_weight.values():
        embeddings = [path for path in paths if issubclass(stands_for(modules[path]), nn.Embedding)]
        if len(paths) > 1 and embeddings:
            found[embeddings[0]] = [path for path in paths if path != embeddings[0]]
    return found
