"""Checks all laws on a user's model and config, and returns a table of the results."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from graphpeft.graph.errors import TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.testing import laws
from graphpeft.testing.two_adapters import assert_two_adapters_act_together
from graphpeft.testing.verdicts import Law, Verification, verified
from graphpeft.tracing.trace import trace


def verify(
    model: nn.Module,
    config: ConfigLike,
    example_inputs: ExampleInputs,
    *others: ExampleInputs,
    progress: bool = True,
    quiet: bool = False,
) -> Verification:
    """Checks all laws on copies of `model`, which stays unchanged, and prints a table of the results.

    Args:
        model: Any module that can be copied, without adapters. It is traced once, in its present mode.
        config: The config.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
        others: Other inputs, of other sizes, for which a trace of the model must compute the same or raise GuardError.
        progress: Whether to show a progress bar, on stderr in a terminal.
        quiet: Whether not to print the table.

    Returns:
        The table; its `holds` is True if no law fails.

    Raises:
        AdaptError: If the model can't be adapted with this config.

    >>> from graphpeft import LoraConfig
    >>> config = LoraConfig(r=2, target_modules=["0"])
    >>> verify(nn.Sequential(nn.Linear(4, 4)), config, (torch.ones(2, 4),), progress=False, quiet=True).holds
    True
    """
    ours = as_config(config)

    def build() -> nn.Module:
        return copy.deepcopy(model)

    adapted = get_peft_model(build(), ours, example_inputs=example_inputs)
    tracer, of_adapter = _OneTrace(), (build, ours, example_inputs)

    def checked(law: Callable[..., None], note: str = "", **options: Any) -> Callable[[], str]:
        def check() -> str:
            law(*of_adapter, **options)
            return note

        return check

    def traced_is_the_model() -> None:
        laws.assert_traced_is_the_model(
            build, example_inputs, *others, may_refuse=True, modes=(model.training,), tracer=tracer
        )

    no_merge = _no_merge(adapted)
    found = (
        # first, since this law must see the tracing itself; the other laws get copies of the trace
        Law("7 a traced model is the model", traced_is_the_model),
        Law(
            "1 a fresh adapter changes no output",
            checked(laws.assert_fresh_adapter_changes_no_output),
            silent=_not_an_identity(adapted),
        ),
        Law("2 exactly the adapter is trained", checked(laws.assert_only_the_adapter_is_trained)),
        Law(
            "3 merged is adapted, unload restores",
            checked(laws.assert_adapted_is_base_with_delta, no_merge),
        ),
        Law("4 saved and loaded is the same", checked(laws.assert_saved_is_loaded)),
        Law("5 a traced model is adapted alike", checked(laws.assert_traced_is_adapted_alike, tracer=tracer)),
        Law("6 dry runs and failures change nothing", checked(laws.assert_dry_runs_change_nothing)),
        Law("8 copies stay adapted", checked(laws.assert_copies_stay_adapted)),
        Law("9 two adapters act together", checked(assert_two_adapters_act_together, no_merge)),
    )
    return verified(f"{type(model).__name__} with {ours.method}", found, progress, quiet)


def _not_an_identity(adapted: Any) -> str:
    config = adapted.active_peft_config
    return "" if config.starts_as_identity else f"{type(config).__name__}.starts_as_identity is False"


def _no_merge(adapted: Any) -> str:
    adapter = adapted._peft_adapters.by_name["default"]
    reasons = {reason: site.site.name for site in reversed(adapter.sites) if (reason := site.unmergeable) is not None}
    return "; ".join(f"{name} can't be merged: {reason}" for reason, name in reversed(reasons.items()))


class _OneTrace:
    """Traces a model once for all laws. The first call returns the trace; later calls, copies of it as it was.

    If the trace fails, later calls raise the same error.
    """

    def __init__(self) -> None:
        self._error: TraceError | None = None
        self._traced: Any = None
        self._values: dict[str, torch.Tensor] = {}

    def __call__(self, model: nn.Module, inputs: ExampleInputs) -> Any:
        if self._error is not None:
            raise self._error
        if self._traced is not None:
            copied = copy.deepcopy(self._traced)
            for name, tensor in _tensors(copied):
                tensor.data.copy_(self._values[name])
            return copied
        try:
            self._traced = trace(model, inputs)
        except TraceError as error:
            self._error = error
            raise
        self._values = {name: tensor.detach().clone() for name, tensor in _tensors(self._traced)}
        return self._traced


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
