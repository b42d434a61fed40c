"""Graph networks of torch-geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch_geometric.nn as geometric
from loops import adapted, close, fit
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from workflow import Values, workflow

TOOL = "torch-geometric"
OWN = "PEFT knows no linear layer of torch-geometric"
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 1], [1, 2, 3, 4, 5, 0, 4]])


@workflow(TOOL, "GCN, whose layers have a linear layer of the library's own", apart=OWN)
def gcn(peft: Any, folder: Path) -> Values:
    return _trained(peft, lambda: geometric.GCN(8, 12, 2, 3), ["lin"], folder)


@workflow(TOOL, "GAT with two heads", apart=OWN)
def gat(peft: Any, folder: Path) -> Values:
    return _trained(peft, lambda: geometric.GAT(8, 12, 2, 3, heads=2), ["lin"], folder)


@workflow(TOOL, "GraphSAGE, all linear layers", apart=OWN)
def sage(peft: Any, folder: Path) -> Values:
    return _trained(peft, lambda: geometric.GraphSAGE(8, 12, 2, 3), ["lin_l", "lin_r"], folder)


@workflow(TOOL, "GIN, whose layers have an MLP of PyTorch's layers")
def gin(peft: Any, folder: Path) -> Values:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = geometric.GINConv(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12)))
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.head(self.conv(x, edges))

    return _trained(peft, Network, ["nn.0", "nn.2"], folder, modules_to_save=["head"])


@workflow(TOOL, "batches of graphs by DataLoader, pooled for a label of each")
def batches(peft: Any, folder: Path) -> Values:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = geometric.GINConv(nn.Sequential(nn.Linear(8, 12), nn.ReLU()))
            self.head = nn.Linear(12, 2)

        def forward(self, data: Any) -> Tensor:
            return self.head(geometric.global_mean_pool(self.conv(data.x, data.edge_index), data.batch))

    graphs = [Data(x=X[:count], edge_index=EDGES[:, : count - 2] % count, y=count % 2) for count in (4, 5, 6, 4)]
    torch.manual_seed(0)
    model = adapted(peft, Network(), "nn.0", "head")
    losses = []
    for batch in DataLoader(graphs, batch_size=2):  # type: ignore[arg-type]
        losses += fit(model, lambda batch=batch: nn.functional.cross_entropy(model(batch), batch.y), steps=2)
    return {"losses": losses}


@workflow(TOOL, "HeteroConv over nodes of two types", apart=OWN)
def heterogeneous(peft: Any, folder: Path) -> Values:
    first, second = ("a", "to", "b"), ("b", "to", "a")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convs: Any = {first: geometric.SAGEConv((8, 8), 12), second: geometric.SAGEConv((8, 8), 12)}
            self.conv = geometric.HeteroConv(convs)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            out = self.conv({"a": x, "b": x + 1}, {first: edges, second: edges.flip(0)})
            return torch.cat([out["a"], out["b"]], 1)

    return _trained(peft, Network, ["lin_l"], folder)


@workflow(TOOL, "GraphSAGE that to_hetero has made a graph module over types", apart=OWN)
def to_hetero(peft: Any, folder: Path) -> Values:
    first, second = ("a", "to", "b"), ("b", "to", "a")
    torch.manual_seed(0)
    base = geometric.to_hetero(geometric.GraphSAGE(8, 12, 2, 3), (["a", "b"], [first, second]))
    model = adapted(peft, base, target_modules=r".*lin_l")
    edges = {first: EDGES, second: EDGES.flip(0)}
    losses = fit(model, lambda: sum(value.square().mean() for value in model({"a": X, "b": X + 1}, edges).values()))
    assert losses[-1] < losses[0]
    return {"losses": losses}


def _trained(peft: Any, build: Any, targets: list[str], folder: Path, **options: Any) -> Values:
    """Adapts a model, trains it, saves, loads and merges its adapter."""
    torch.manual_seed(0)
    base = build()
    start = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(peft, base, *targets, **options)
    losses = fit(model, lambda: model(X, EDGES).square().mean())
    assert losses[-1] < losses[0]
    output = model(X, EDGES)
    model.save_pretrained(str(folder))
    fresh = build()
    fresh.load_state_dict(start)
    loaded = peft.PeftModel.from_pretrained(fresh, str(folder))
    close(loaded(X, EDGES), output)
    close(loaded.merge_and_unload()(X, EDGES), output)
    return {"losses": losses}
