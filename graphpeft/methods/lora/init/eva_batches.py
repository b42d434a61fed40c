"""The inputs of layers in runs of a model, of which EVA finds the directions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphpeft._torch import pytree


@dataclass
class Batches:
    """Runs a model on batches, and selects the inputs of its layers.

    Attributes:
        model: The model.
        data: The batches.
        config: The config.
        forward: Calls the model with a batch.
        prepare: Makes of a batch and the config the second argument of `rows_of`; None for a copy of the batch.
        rows_of: Makes rows, (number, features), of a layer's inputs, of the result of `prepare`, and of the layer's
            path; or such functions by path. None takes all rows.
    """

    model: nn.Module
    data: Iterable[Any]
    config: Any
    forward: Callable[[nn.Module, Any], Any]
    prepare: Callable[[Any, Any], Any] | None
    rows_of: Callable[[Any, Any, str], Tensor] | Mapping[str, Callable[[Any, Any, str], Tensor]] | None

    def run(self, batch: Any, layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], object]) -> None:
        """Runs one batch, and calls `take` with the path and the rows of each of `layers`."""
        device = next(self.model.parameters()).device
        batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        prepared = self.prepare(batch, self.config) if self.prepare is not None else copy.deepcopy(batch)

        def watch(path: str) -> Callable[..., None]:
            function = self.rows_of.get(path) if isinstance(self.rows_of, Mapping) else self.rows_of
            function = function or _all_rows

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                take(path, function(args or (kwargs["input"],), prepared, path))

            return hook

        with contextlib.ExitStack() as hooks:
            for path, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(watch(path), with_kwargs=True))
            self.forward(self.model, batch)


def first_tensor(layer_input: Any) -> Tensor:
    """Returns a layer's input, which comes alone or as the first of its arguments."""
    return layer_input if isinstance(layer_input, Tensor) else layer_input[0]


def _all_rows(layer_input: Any, *_: Any) -> Tensor:
    return first_tensor(layer_input).flatten(0, -2)
