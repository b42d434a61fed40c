"""Sequences of edits of an adapted model: adapters are added, chosen, disabled and deleted in any order."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import get_peft_model
from graphpeft.model.peft_model import PeftModel
from graphpeft.rules.config import PeftConfig
from graphpeft.testing import laws
from graphpeft.testing.blame import Build
from graphpeft.testing.comparing import LawError
from graphpeft.testing.snapshots import require_unloaded, with_saved

KINDS = ("add", "choose", "choose all", "disable", "enable", "delete", "copy")
"""The kinds of edits."""


@dataclass(frozen=True)
class Edit:
    """One edit of a model.

    Attributes:
        kind: One of `KINDS`.
        number: The index of the edited adapter, modulo the number of adapters.
        config: The config of an added adapter.
    """

    kind: str
    number: int
    config: PeftConfig

    def apply(self, model: Any, inputs: ExampleInputs) -> Any:
        """Edits `model` and returns it, or its copy. On a model without adapters, edits that need one do nothing."""
        names = list(model.peft_config) if isinstance(model, PeftModel) else []
        if self.kind == "add":
            return get_peft_model(model, copy.copy(self.config), _free_name(names), example_inputs=inputs)
        if self.kind == "copy":
            return copy.deepcopy(model)
        if not names:
            return model
        name = names[self.number % len(names)]
        if self.kind == "choose all":
            # adapters that fully train the same tensor can't be active together, and are refused
            with contextlib.suppress(AdaptError):
                model.set_adapter(names)
        elif self.kind == "delete":
            model.delete_adapter(name)
        elif self.kind == "disable":
            model.disable_adapters()
        elif self.kind == "enable":
            model.enable_adapters()
        else:
            model.set_adapter(name)
        return model


def _free_name(names: Sequence[str]) -> str:
    candidates = ("default", *(f"more_{number}" for number in range(len(names) + 1)))
    return next(name for name in candidates if name not in names)


@st.composite
def edits(draw: Any, configs: st.SearchStrategy[PeftConfig], most: int = 6) -> list[Edit]:
    """Returns a strategy for sequences of edits, the first of which adds an adapter."""
    config = draw(configs)
    one = st.builds(Edit, st.sampled_from(KINDS), st.integers(0, 3), st.just(config))
    return [Edit("add", 0, config), *draw(st.lists(one, max_size=most - 1))]


def assert_edits_can_be_undone(build: Build, made: Sequence[Edit], inputs: ExampleInputs) -> None:
    """Laws 3 and 6 for a sequence of edits: disabled is the base, and `unload` restores it exactly."""
    base = laws.run(build().eval().requires_grad_(False), inputs)
    model: Any = build().eval()
    for number, edit in enumerate(made):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = edit.apply(model, inputs)
        if not isinstance(model, PeftModel):
            continue
        copied = copy.deepcopy(model)
        try:
            with copied.disable_adapter():
                laws.require_equal(laws.run(copied, inputs), base, "a disabled adapter changes the output")
            left = with_saved(build().eval(), copied)
            require_unloaded(copied.unload(), left, inputs)
        except LawError as error:
            raise LawError(f"after {', '.join(edit.kind for edit in made[: number + 1])}: {error}") from error
