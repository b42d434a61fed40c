"""Checks all laws on a user's model and config, and returns a table of the results."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.given_config import ConfigLike, as_config
from graphpeft.testing import laws
from graphpeft.testing.comparing import LawError
from graphpeft.testing.copies import assert_copies_stay_adapted, ways_left_out
from graphpeft.testing.reference import Reference
from graphpeft.testing.single_layers import Subject, single_layers
from graphpeft.testing.two_adapters import assert_two_adapters_act_together
from graphpeft.testing.verdicts import Law, Verification, verified
from graphpeft.tracing.trace import trace


def verify(
    model: nn.Module,
    config: ConfigLike,
    example_inputs: ExampleInputs,
    *others: ExampleInputs,
    reference: Reference | None = None,
    progress: bool = True,
    quiet: bool = False,
) -> Verification:
    """Checks all laws on copies of `model`, which stays unchanged, and prints a table of the results.

    Args:
        model: Any module that can be copied, without adapters. It is traced once, in its present mode.
        config: The config.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
        others: Other inputs, of other sizes, for which the laws must hold, too; where a trace of the model raises
            GuardError, they don't apply.
        reference: The method's equation in plain PyTorch, with which the third law compares the adapted model. It finds
            a rule whose `rewrite` and `delta` are wrong alike. The function gets values by its arguments' names:
            ``weight``, in PEFT's layout, ``bias``, ``site``, ``config``, and the rule's parameters and constants. It
            returns the changed weight; or, if it asks for ``x``, the first input of an adapted layer, or ``inputs``,
            all inputs by name, the output of the layer. Then it can call ``layer``, the layer without adapters.
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
    >>> def lora(weight, lora_A, lora_B, config):
    ...     return weight + config.lora_alpha / config.r * lora_B @ lora_A
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> verify(model, config, (torch.ones(2, 4),), reference=lora, progress=False, quiet=True).holds
    True
    """
    ours = as_config(config)

    def build() -> nn.Module:
        return copy.deepcopy(model)

    adapted = get_peft_model(build(), ours, example_inputs=example_inputs)
    tracer, itself = _OneTrace(), Subject("", build, ours, example_inputs, others)
    with warnings.catch_warnings():
        # each was given when the model itself was adapted
        warnings.simplefilter("ignore")
        layers, left_out = single_layers(build, ours, example_inputs)

    def checked(law: Callable[..., None], note: str = "", **options: Any) -> Callable[[], str]:
        def check() -> str:
            law(*itself.adaptation, **options)
            return note

        return check

    def on_all(law: Callable[[Subject], None], note: str = "") -> Callable[[], str]:
        return functools.partial(_on_all, law, (itself, *layers), note)

    def is_base_with_delta(one: Subject) -> None:
        equation = reference if one.has_reference else None
        laws.assert_adapted_is_base_with_delta(
            *one.adaptation, tolerance=one.tolerance, others=one.others, reference=equation
        )

    def copies_stay_adapted() -> str:
        assert_copies_stay_adapted(*itself.adaptation, others)
        return "; ".join(f"not by {way}, since the base itself: {why}" for way, why in ways_left_out(build).items())

    def traced_is_the_model() -> None:
        laws.assert_traced_is_the_model(
            build, example_inputs, *others, may_refuse=True, modes=(model.training,), tracer=tracer
        )

    def is_trained(one: Subject) -> None:
        laws.assert_only_the_adapter_is_trained(*one.adaptation)

    no_merge = _no_merge(adapted)
    found = (
        # first, since this law must see the tracing itself; the other laws get copies of the trace
        Law("7 a traced model is the model", traced_is_the_model),
        Law(
            "1 a fresh adapter changes no output",
            on_all(lambda one: laws.assert_fresh_adapter_changes_no_output(*one.adaptation, others=one.others)),
            silent=_not_an_identity(adapted),
        ),
        Law(
            "2 exactly the adapter is trained",
            on_all(is_trained),
        ),
        Law(
            "3 merged is adapted, unload restores",
            on_all(is_base_with_delta, no_merge),
        ),
        Law(
            "4 saved and loaded is the same",
            checked(laws.assert_saved_is_loaded, others=others),
        ),
        Law(
            "5 a traced model is adapted alike",
            checked(laws.assert_traced_is_adapted_alike, tracer=tracer, others=others),
        ),
        Law("6 dry runs and failures change nothing", checked(laws.assert_dry_runs_change_nothing)),
        Law("8 copies stay adapted", copies_stay_adapted),
        Law(
            "9 two adapters act together",
            checked(assert_two_adapters_act_together, no_merge, others=others),
        ),
    )
    subject = [f"{type(model).__name__} with {ours.method}", *_also_on(layers, left_out)]
    return verified("\n".join(subject), found, progress, quiet)


def _on_all(law: Callable[[Subject], None], subjects: Sequence[Subject], note: str) -> str:
    """Checks a law on the user's model, and on single layers, of which a refusal says nothing about the model."""
    notes, refusal = [note] if note else [], None
    for one in subjects:
        try:
            law(one)
        except LawError as error:
            raise LawError(f"on {one.what}: {error}" if one.what else str(error)) from error
        except (AdaptError, GuardError, TraceError) as error:
            if one.what:
                notes.append(f"not on {one.what}: {str(error).partition(chr(10))[0]}")
            else:
                refusal = error
    if refusal is not None:
        raise refusal
    return "; ".join(notes)


def _also_on(layers: Sequence[Subject], left_out: Sequence[str]) -> list[str]:
    """Returns the lines that say on which single layers laws are checked, too."""
    also = "; ".join(dict.fromkeys(one.what for one in layers))
    lines = [f"laws 1 to 3 also on: {also}"] if also else []
    return [*lines, *(f"not on {reason}" for reason in left_out)]


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
