"""Layers tied to an embedding: their weight is the same tensor as its table, as an output head's may be."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphpeft.graph.traced_model import stands_for


def tied_layers(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Returns the paths of the other modules whose weight is an embedding's tensor, by the embedding's path."""
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
