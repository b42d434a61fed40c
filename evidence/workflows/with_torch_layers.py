"""PyTorch's layers: tied, normed, pruned, parametrized, recurrent and in containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loops import adapted, close, fit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from workflow import Values, workflow

TOOL = "torch, layers"


@workflow(TOOL, "nn.LSTM by target_parameters")
def lstm(peft: Any, folder: Path) -> Values:
    return _trained(
        peft, nn.LSTM(8, 6, batch_first=True), [], folder, Recurrent, target_parameters=["lstm.weight_ih_l0"]
    )


@workflow(TOOL, "a linear layer under weight_norm of parametrizations")
def weight_norm(peft: Any, folder: Path) -> Values:
    return _trained(peft, parametrizations.weight_norm(nn.Linear(8, 8)), ["layer"], folder)


@workflow(TOOL, "a linear layer under spectral_norm of parametrizations")
def spectral_norm(peft: Any, folder: Path) -> Values:
    return _trained(peft, parametrizations.spectral_norm(nn.Linear(8, 8)), ["layer"], folder)


@workflow(TOOL, "a linear layer that is pruned")
def pruned(peft: Any, folder: Path) -> Values:
    return _trained(peft, prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), ["layer"], folder)


@workflow(TOOL, "an embedding whose weight is tied to the output layer")
def tied(peft: Any, folder: Path) -> Values:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle = nn.Embedding(12, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.middle(self.embedding(tokens))))

    torch.manual_seed(0)
    model, tokens = adapted(peft, Tied(), "middle"), torch.arange(10).reshape(2, 5)
    losses = fit(model, lambda: model(tokens).square().mean())
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.embedding.weight
    return {"losses": losses, "merged": merged(tokens).square().sum().item()}


@workflow(TOOL, "one layer that a model calls twice")
def called_twice(peft: Any, folder: Path) -> Values:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.inner(x)))

    return _trained(peft, Twice(), ["inner"], folder)


@workflow(
    TOOL,
    "one layer in two places of a model",
    apart="PEFT adapts it in the first place alone, so that the second call is the base's",
)
def in_two_places(peft: Any, folder: Path) -> Values:
    layer = nn.Linear(8, 8)
    return _trained(peft, nn.Sequential(layer, nn.Tanh(), layer), ["0"], folder)


@workflow(TOOL, "a layer in a list that the forward indexes, and one in a dict")
def containers(peft: Any, folder: Path) -> Values:
    class Contained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
            self.named = nn.ModuleDict({"first": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            for index in reversed(range(2)):
                x = torch.tanh(self.layers[index](x))
            return self.named["first"](x)

    return _trained(peft, Contained(), ["layers.0", "layers.1", "first"], folder)


class Around(nn.Module):
    """Calls a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Recurrent(nn.Module):
    """Calls a layer that hands a state on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lstm = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _trained(
    peft: Any, layer: nn.Module, targets: list[str], folder: Path, around: Any = Around, **options: Any
) -> Values:
    """Adapts a layer, or layers in it, and trains, saves and loads the adapter."""
    base = around(layer)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(peft, base, target_modules=targets, **options)
    x = torch.randn(3, 8) if around is Around else torch.randn(3, 5, 8)
    losses = fit(model, lambda: model(x).square().mean())
    output = model.eval()(x)
    model.save_pretrained(str(folder))
    fresh = model.unload()
    fresh.load_state_dict(start)
    close(peft.PeftModel.from_pretrained(fresh, str(folder)).eval()(x), output)
    return {"losses": losses}
