"""A method with options, here and in PEFT, and the layers that both adapt alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from oracle import Case

from graphpeft import PeftConfig, PeftType


class Contract(NamedTuple):
    """A method with options.

    Attributes:
        name: What it is called; unlike all others.
        ours: This library's class of the config.
        theirs: PEFT's.
        options: The options of both, beside those that name targets.
        cases: Models that both libraries adapt.
        beyond: Models that PEFT refuses, or adapts wrongly; the laws hold for them.
        llama: Options that name targets in a Llama, beside `options`.
        refuses: Why the method refuses to "merge", to be active "together" with another of its kind, to "merge beside"
            an active adapter of another method, to "merge llama", whose layers have no bias, to act "before dora",
            which reads the weight so far, to change a weight that is read "both ways", to compute "rows" of a batch
            apart, or to be exported as "onnx" or "pt2": a pattern for the error's text.
        sized: Options of the row of sizes in docs/methods.md, beside the defaults and `q_proj` and `v_proj` as targets.
        trains_alike: Whether a training step draws the same numbers as PEFT's, and so gives the same gradients.
        tolerance: The largest difference from PEFT's outputs, relative to their size.
        trained_by_mistake: A part of the names of parameters that PEFT trains beside half precision, and saves nowhere.
    """

    name: str
    ours: type[PeftConfig]
    theirs: Callable[..., Any]
    options: Mapping[str, Any]
    cases: tuple[Case, ...]
    beyond: tuple[Case, ...] = ()
    llama: Mapping[str, Any] = MappingProxyType({"target_modules": ["q_proj", "down_proj"]})
    refuses: Mapping[str, str] = MappingProxyType({})
    sized: Mapping[str, Any] = MappingProxyType({})
    trains_alike: bool = True
    tolerance: float = 1e-5
    trained_by_mistake: str = ""

    @property
    def method(self) -> PeftType:
        """The method's name."""
        return PeftType(self.ours.peft_type)

    def our_config(self, case: Case | None = None, **more: Any) -> Any:
        """Returns this library's config for a case, or for the Llama."""
        return self.ours(**self._options(case, more))

    def their_config(self, case: Case | None = None, **more: Any) -> Any:
        """Returns PEFT's."""
        return self.theirs(**self._options(case, more))

    def of_size(self) -> Any:
        """Returns this library's config with its defaults, for a Llama."""
        return self.ours(**{"target_modules": ["q_proj", "v_proj"], **self.sized})

    def _options(self, case: Case | None, more: Mapping[str, Any]) -> dict[str, Any]:
        return {**(self.llama if case is None else case.targets), **self.options, **more}

    def __str__(self) -> str:
        return self.name
