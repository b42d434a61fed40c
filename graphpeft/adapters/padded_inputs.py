"""Keeps ``nn.TransformerEncoder`` from handing nested tensors to layers in which a graph runs.

In evaluation the encoder packs a padded batch into a nested tensor, which only the fused kernel of a whole layer takes.
The kernel knows nothing of adapters, and whether it may run the encoder asks of the weights of its first layer alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from graphpeft.adapters.state import Modules
from graphpeft.graph import in_place
from graphpeft.graph.template import graph_forward


def keep_padded(modules: Modules, regions: Iterable[str]) -> None:
    """Lets each encoder around one of these regions keep its inputs padded while a graph runs inside, and only then."""
    for path in _around(regions) & modules.keys():
        encoder = modules[path]
        if isinstance(encoder, nn.TransformerEncoder):
            if any(graph_forward(inner) is not None for inner in encoder.layers.modules()):
                in_place.put_on(encoder, _LAYER)
            else:
                in_place.take_off(encoder, "padded")


def _around(regions: Iterable[str]) -> set[str]:
    """Returns the paths of all that is around one of these regions."""
    around: set[str] = set()
    for path in regions:
        while path and (path := path.rpartition(".")[0]) not in around:
            around.add(path)
    return around


def _never(_: nn.Module) -> bool:
    return False


def _set(encoder: nn.Module, value: Any) -> None:
    encoder.__dict__["use_nested_tensor"] = value


def _layer() -> in_place.Layer:
    return _LAYER


# of all that the encoder asks, the one that is of this alone
_LAYER = in_place.Layer("padded", (), {"use_nested_tensor": property(_never, _set)}, (_layer, ()))
