"""Runs all laws on one model and one config of a user's, and tells in a table which of them hold."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn
from tqdm import tqdm

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.errors import GuardError, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.rules.config import ConfigLike, PeftConfig, as_config
from graphpeft.rules.report import table
from graphpeft.testing import laws
from graphpeft.testing.blame import Build, LawError

Outcome = Literal["holds", "fails", "doesn't apply"]


class Verdict(NamedTuple):
    """What became of one law.

    Attributes:
        law: The law.
        outcome: ``"holds"``, ``"fails"`` or ``"doesn't apply"``.
        why: Why it doesn't hold or apply; or what of it could not be looked at.
        seconds: How long that took.
    """

    law: str
    outcome: Outcome
    why: str
    seconds: float


@dataclass(frozen=True)
class Verification:
    """What became of all laws; it prints as a table.

    Attributes:
        subject: The model and the method.
        verdicts: What became of each.
    """

    subject: str
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool:
        """Whether no law fails."""
        return not self.failures

    @property
    def failures(self) -> tuple[Verdict, ...]:
        """The laws that fail."""
        return tuple(verdict for verdict in self.verdicts if verdict.outcome == "fails")

    def __str__(self) -> str:
        rows = [
            (law, outcome, f"{seconds:.1f}", why.partition("\n")[0]) for law, outcome, why, seconds in self.verdicts
        ]
        lines = [self.subject, "", *table(("law", "outcome", "seconds", "why"), rows)]
        for failure in self.failures:
            lines += ["", f"{failure.law}:", failure.why]
        return "\n".join(lines)

    __repr__ = __str__


class _Law(NamedTuple):
    """A law, and when it speaks of an adapter.

    Attributes:
        text: The law in a few words.
        check: Raises unless it holds.
        silent: Returns the reason why it doesn't speak of an adapter, or "".
        partly: Returns the reason why only a part of it does, or "".
    """

    text: str
    check: Callable[[Build, PeftConfig, ExampleInputs], None]
    silent: Callable[[Any], str] = lambda _: ""
    partly: Callable[[Any], str] = lambda _: ""


def verify(
    model: nn.Module,
    config: ConfigLike,
    example_inputs: ExampleInputs,
    *others: ExampleInputs,
    progress: bool = True,
    quiet: bool = False,
) -> Verification:
    """Runs all laws on copies of `model`, which stays as it is, and prints what became of each.

    Args:
        model: Any module that can be copied, without adapters.
        config: The config.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
        others: Other inputs, of other sizes, which a trace of the model must serve too, or refuse.
        progress: Whether to show a progress bar.
        quiet: Whether not to print the table.

    Returns:
        The table, whose `holds` says whether no law fails.

    Raises:
        AdaptError: If the model can't be adapted with this config.
    """
    ours = as_config(config)

    def build() -> nn.Module:
        return copy.deepcopy(model)

    adapted = get_peft_model(build(), ours, example_inputs=example_inputs)
    verdicts = []
    with tqdm(_laws(others), disable=not progress, leave=False) as bar:
        for law in bar:
            bar.set_description(law.text)
            verdicts.append(_verdict(law, build, ours, example_inputs, adapted))
    found = Verification(f"{type(model).__name__} with {ours.method}", tuple(verdicts))
    if not quiet:
        print(found)  # noqa: T201
    return found


def _verdict(law: _Law, build: Build, config: PeftConfig, inputs: ExampleInputs, adapted: Any) -> Verdict:
    silent = law.silent(adapted)
    if silent:
        return Verdict(law.text, "doesn't apply", silent, 0.0)
    start = time.perf_counter()
    outcome, why = _outcome(law, build, config, inputs, adapted)
    return Verdict(law.text, outcome, why, time.perf_counter() - start)


def _outcome(law: _Law, build: Build, config: PeftConfig, inputs: ExampleInputs, adapted: Any) -> tuple[Outcome, str]:
    try:
        with warnings.catch_warnings():
            # what the model or the config is warned of has been said when it was adapted before
            warnings.simplefilter("ignore")
            law.check(build, config, inputs)
    except TraceError as error:
        return "doesn't apply", f"the model can't be traced: {error}"
    except GuardError as error:
        return "doesn't apply", f"a trace of the model refuses the call: {error}"
    except AdaptError as error:
        return "doesn't apply", f"it is refused: {error}"
    except LawError as error:
        return "fails", str(error)
    return "holds", law.partly(adapted)


def _not_an_identity(adapted: Any) -> str:
    config = adapted.active_peft_config
    return "" if config.starts_as_identity else f"{type(config).__name__}.starts_as_identity is False"


def _no_merge(adapted: Any) -> str:
    adapter = adapted._peft_adapters.by_name["default"]
    reasons = {reason: site.site.name for site in reversed(adapter.sites) if (reason := site.unmergeable) is not None}
    return "; ".join(f"{name} can't be merged: {reason}" for reason, name in reversed(reasons.items()))


def _laws(others: tuple[ExampleInputs, ...]) -> tuple[_Law, ...]:
    """Returns all laws, in their order, for a model that has these other inputs."""

    def traced_is_the_model(build: Build, _: PeftConfig, inputs: ExampleInputs) -> None:
        laws.assert_traced_is_the_model(build, inputs, *others, may_refuse=True)

    return (
        _Law("1 a fresh adapter changes no output", laws.assert_fresh_adapter_changes_no_output, _not_an_identity),
        _Law("2 exactly the adapter is trained", laws.assert_only_the_adapter_is_trained),
        _Law("3 merged is adapted, unload restores", laws.assert_adapted_is_base_with_delta, partly=_no_merge),
        _Law("4 saved and loaded is the same", laws.assert_saved_is_loaded),
        _Law("5 a traced model is adapted alike", laws.assert_traced_is_adapted_alike),
        _Law("6 dry runs and failures change nothing", laws.assert_dry_runs_change_nothing),
        _Law("7 a traced model is the model", traced_is_the_model),
        _Law("8 copies stay adapted", laws.assert_copies_stay_adapted),
    )
