"""Call arguments that any graph inside the model reads by name, whether or not the model's forward takes them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from graphpeft.graph.call_values import PerCall
from graphpeft.graph.recomputing import is_reentrant, taken_along

CALL_INPUTS: PerCall[Mapping[str, Any]] = PerCall("arguments", "pass them to the compiled model itself")
"""The readable arguments of the current call, by name."""

PROMPT: PerCall[torch.Tensor] = PerCall("prompt", "let each of them generate in a thread (asyncio.to_thread)")
"""The tokens from which the model generates now, of shape (rows, length)."""


class CallInput(NamedTuple):
    """A call argument that a graph reads.

    Attributes:
        name: The argument's name.
    """

    name: str


def given(read: Mapping[str, bool], kwargs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Makes arguments of a call readable to graphs, for the duration of the context."""
    own = {name: value for name, value in kwargs.items() if name in read}
    # an adapted model may be nested in another
    present = {**(CALL_INPUTS.get() or {}), **own}
    return taken_along(functools.partial(CALL_INPUTS.during, present)) if own else contextlib.nullcontext()


def given_to_rows(rows: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Makes of the readable arguments what some rows of the batch have of them."""
    present = CALL_INPUTS.get()
    if not present:
        return contextlib.nullcontext()
    own = {name: _of_rows(value, rows) for name, value in present.items()}
    return taken_along(functools.partial(CALL_INPUTS.during, own))


def _of_rows(value: Any, rows: Sequence[int]) -> Any:
    if isinstance(value, Mapping):
        return {key: _of_rows(inner, rows) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return value[torch.tensor(rows, device=value.device)]
    return [value[row] for row in rows]


def left(read: Mapping[str, bool], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments to pass to the model's forward; arguments as for `given`."""
    return {name: value for name, value in kwargs.items() if read.get(name, True)}


def call_input(name: str) -> Any:
    """Returns an argument of the current call of the model."""
    given = CALL_INPUTS.get()
    if given is None or name not in given:
        raise TypeError(f"an active adapter needs {name} in each call: model(…, {name}=…)")
    if is_reentrant() and _gets_gradients(given[name]):
        raise RuntimeError(
            f"a reentrant checkpoint can't give {name} its gradients, as other layers read that, too; checkpoint with "
            "use_reentrant=False"
        )
    return given[name]


def _gets_gradients(value: Any) -> bool:
    tensors = value.values() if isinstance(value, dict) else (value,)
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in tensors)
