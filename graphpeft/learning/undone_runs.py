"""Runs of a batch after which the model, the batch and all generators are as they were before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphpeft._torch import post_accumulate_hooks, pytree, storage_key, uncompiled, version, written_arguments
from graphpeft.dry_runs import trial
from graphpeft.graph.dependencies import writes_by_method
from graphpeft.tracing.random_numbers import random_python_states, random_python_states_kept
from graphpeft.transaction import remember, undone_by


@contextlib.contextmanager
def undone(model: nn.Module, changed: Iterable[Tensor] = ()) -> Iterator[None]:
    """Puts back what runs in the context change: gradients, buffers, hooks, the states of random numbers, and values.

    Of parameters whose values a forward may overwrite, those are put back that it has written within `WritesUndone`.
    """
    # compiled code would run without what watches it, or refuse that
    with trial(model), torch.random.fork_rng(), random_python_states_kept(), uncompiled():
        for parameter in model.parameters():
            undone_by(setattr, parameter, "grad", parameter.grad)
            undone_by(_hold_again, parameter, parameter.data)
            _set_aside(post_accumulate_hooks(parameter))
        for module in model.modules():
            # hooks, too: one of those that watch the runs stays if the user interrupts at the wrong moment
            for held in (module._buffers, module._forward_pre_hooks, module._forward_hooks):
                if isinstance(held, dict):  # a scripted module has others, which can't change
                    undone_by(_refill, held, dict(held))
            for tensor in (*module._buffers.values(), *_plain(module, Tensor)):
                if tensor is not None:
                    remember(tensor)
            for tensor in _plain(module, Tensor):
                if tensor.is_leaf:
                    undone_by(setattr, tensor, "grad", tensor.grad)
            for generator in _plain(module, torch.Generator):
                undone_by(generator.set_state, generator.get_state())
        for tensor in changed:
            remember(tensor)
        yield


def random_states() -> tuple[Any, ...]:
    """Returns the states of all generators, which are equal where no random number was drawn in between."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = (state.numpy().tobytes() for state in (torch.get_rng_state(), *devices))
    return (*states, *random_python_states())


def _plain(module: nn.Module, kind: type[Any]) -> list[Any]:
    """Returns what a module holds in plain attributes."""
    return [value for value in vars(module).values() if isinstance(value, kind)]


def _set_aside(hooks: dict[int, Any]) -> None:
    """Takes hooks off that run after a gradient is there: they may step an optimizer, or set the gradient to None."""
    undone_by(_refill, hooks, dict(hooks))
    for key, hook in [*hooks.items()]:
        # those of PyTorch itself are parts of a backward, as that of a sharded parameter is
        if not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch."):
            del hooks[key]


def _hold_again(parameter: Tensor, data: Tensor) -> None:
    if parameter.data.data_ptr() != data.data_ptr():
        parameter.data = data


def _refill(held: dict[Any, Any], kept: dict[Any, Any]) -> None:
    held.clear()  # also of what was added, such as a buffer that a forward has registered
    held.update(kept)


class WritesUndone(TorchFunctionMode):
    """Remembers parameters just before a function writes into them, as a forward does that averages weights.

    To copy all in advance would take the memory of a second model.

    Attributes:
        written: The parameters that were written.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.written: list[Tensor] = []
        self._by_storage: dict[int, list[Tensor]] = {}
        for parameter in model.parameters():
            if (key := _storage(parameter)) is not None:
                self._by_storage.setdefault(key, []).append(parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in pytree.tree_leaves(_written(func, args, kwargs)):
            if isinstance(tensor, Tensor):
                for parameter in self._by_storage.get(_storage(tensor) or 0, ()):
                    remember(parameter)
                    self.written.append(parameter)
        return func(*args, **kwargs)


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns what a function writes into."""
    name = getattr(function, "__name__", "")
    if writes_by_method(name) or kwargs.get("inplace"):
        return [*args[:1]] or [*kwargs.values()]
    if name in ("embedding", "embedding_bag"):
        # with max_norm, a lookup shortens the rows that it reads
        return [*args[1:2]] if kwargs.get("max_norm", args[3] if len(args) > 3 else None) else []
    if name in ("batch_norm", "instance_norm"):
        return [*args[1:5], kwargs.get("running_mean"), kwargs.get("running_var")]
    places = written_arguments(function)
    return [kwargs.get("out"), *(kwargs.get(each, args[places[each] : places[each] + 1]) for each in places)]


def _storage(tensor: Tensor) -> int | None:
    try:
        return storage_key(tensor)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has no storage
        return None


@contextlib.contextmanager
def batch_kept(model: nn.Module, batch: Any) -> Iterator[None]:
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
