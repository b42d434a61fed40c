"""Networks on graphs, molecules and point clouds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case
from torch import nn

NODES, EDGES = 12, 40


def torch_geometric() -> Iterator[Case]:
    """Yields models of PyG: convolutions whose linear layers are its own, attentions, pooling, continuous filters."""
    import torch_geometric.nn as pyg

    name = "torch-geometric"

    def convolutions(kind: Any, **options: Any) -> Any:
        return lambda: kind(8, 16, num_layers=2, out_channels=4, **options)

    for kind, options in (
        (pyg.GCN, {}),
        (pyg.GraphSAGE, {"dropout": 0.1}),
        (pyg.GAT, {"v2": True, "heads": 2}),
        (pyg.GIN, {}),
        (pyg.PNA, {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.arange(6)}),
    ):
        yield Case(name, kind.__name__, convolutions(kind, **options), _nodes_and_edges)
    yield Case(name, "SchNet", lambda: pyg.SchNet(16, 16, 2, 8, interaction_graph=_every_pair), _molecule)
    yield Case(name, "GraphUNet", lambda: pyg.GraphUNet(8, 16, 4, depth=2), _nodes_and_edges)
    yield Case(name, "RGCN", _relational, _typed_edges)
    yield Case(name, "TransformerConv", _transformers, _nodes_and_edges)
    yield Case(name, "GPSConv", _gps, _nodes_and_edges)
    yield Case(name, "AttentiveFP", lambda: pyg.AttentiveFP(8, 16, 4, 3, 2, 2), _molecule_with_edges)


def _relational() -> nn.Module:
    import torch_geometric.nn as pyg

    given = "x, edges, kinds"
    return pyg.Sequential(given, [(pyg.RGCNConv(8, 16, 3), f"{given} -> x"), nn.ReLU(), (nn.Linear(16, 4), "x -> x")])


class _Stack(nn.Module):
    """A convolution with a head behind it."""

    def __init__(self, convolution: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.convolution, self.head = convolution, head

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return self.head(self.convolution(x, edges).relu())


def _transformers() -> nn.Module:
    import torch_geometric.nn as pyg

    return _Stack(pyg.TransformerConv(8, 8, heads=2), pyg.Linear(16, 4))


def _gps() -> nn.Module:
    import torch_geometric.nn as pyg

    return _Stack(pyg.GPSConv(8, pyg.GCNConv(8, 8), heads=2), nn.Linear(8, 4))


def _every_pair(positions: torch.Tensor, _: torch.Tensor) -> Any:
    count = len(positions)
    edges = torch.combinations(torch.arange(count)).T
    edges = torch.cat([edges, edges.flip(0)], 1)
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


def _nodes_and_edges() -> tuple[Any, ...]:
    return torch.randn(NODES, 8), torch.randint(0, NODES, (2, EDGES))


def _typed_edges() -> tuple[Any, ...]:
    return *_nodes_and_edges(), torch.randint(0, 3, (EDGES,))


def _molecule() -> tuple[Any, ...]:
    return torch.randint(1, 9, (NODES,)), torch.randn(NODES, 3)


def _molecule_with_edges() -> tuple[Any, ...]:
    return *_nodes_and_edges(), torch.randn(EDGES, 3), torch.arange(NODES) // 6


def e3nn() -> Iterator[Case]:
    """Yields networks that turn with their inputs, whose code is generated."""
    from e3nn import nn as e3
    from e3nn import o3

    class Equivariant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = o3.Irreps("4x0e + 2x1o")
            self.product = o3.FullyConnectedTensorProduct("3x0e + 1x1o", "1x0e + 1x1o", hidden)
            self.mix = o3.Linear(hidden, "4x0e")
            self.radial = e3.FullyConnectedNet([4, 8, 4], torch.nn.functional.silu)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
            found = self.mix(self.product(x, o3.spherical_harmonics([0, 1], direction, normalize=True)))
            return self.head(found + self.radial(found))

    yield Case("e3nn", "tensor product", Equivariant, lambda: (torch.randn(5, 6), torch.randn(5, 3)))


PACKAGES = (torch_geometric, e3nn)
