"""Runs of a batch after which the model, the batch and all generators are as they were before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from graphpeft._torch import pytree, version
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.tracing.random_numbers import random_python_states_kept
from graphpeft.transaction import remember, trial, undone_by


@contextlib.contextmanager
def undone(model: nn.Module, changed: Iterable[Tensor] = ()) -> Iterator[None]:
    """Puts back what runs in the context change: gradients, buffers, the states of random numbers, and values.

    Args:
        model: The model.
        changed: The tensors whose values are changed in the context, buffers aside.
    """
    with trial(model), torch.random.fork_rng(), random_python_states_kept():
        for parameter in model.parameters():
            undone_by(setattr, parameter, "grad", parameter.grad)
        for module in model.modules():
            undone_by(_refill, module._buffers, dict(module._buffers))
            for buffer in module._buffers.values():
                if buffer is not None:
                    remember(buffer)
        for tensor in changed:
            remember(tensor)
        yield


def _refill(buffers: dict[str, Tensor | None], kept: dict[str, Tensor | None]) -> None:
    buffers.clear()  # of those, too, that a forward has registered
    buffers.update(kept)


@contextlib.contextmanager
def batch_kept(model: nn.Module, batch: ExampleInputs) -> Iterator[None]:
    """Puts back what a run changes of its batch: gradients of inputs, and values that the model overwrites."""
    with trial(model):
        for given in pytree.tree_leaves(batch):
            if not isinstance(given, Tensor) or given.is_inference():
                continue
            if given.is_leaf:
                undone_by(setattr, given, "grad", given.grad)
                given.grad = None
            undone_by(_overwrite_if_changed, given, version(given), given.detach().clone())
        yield


@contextlib.contextmanager
def weights_cast_anew() -> Iterator[None]:
    """Lets autocast forget the casts of weights, whose values differ in each run and afterwards."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _overwrite_if_changed(tensor: Tensor, before: int, values: Tensor) -> None:
    # others, such as an expanded one, can't be written
    if version(tensor) != before:
        tensor.copy_(values)
