"""The annotation of an option says its type, its bounds and its role, whatever the class around it looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
from torch import nn

from graphpeft import DeltaRule, LoraConfig, ParameterSpec, TargetedConfig, get_peft_model, ops
from graphpeft.rules.options import (
    InputDropout,
    Number,
    Role,
    Size,
    TrainedBiases,
    Within,
    check_options,
    options_for,
    sizes_of,
)

pytestmark = pytest.mark.quick("rules")

UpTo10 = Annotated[int, Within("10 at most", 0, 10)]


@dataclass(kw_only=True)
class Again(LoraConfig):
    """Declares options of LoRA's again, without their roles."""

    bias: Any = "none"
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False


@dataclass(kw_only=True)
class Optional(TargetedConfig):
    """Has roles at options that may be None."""

    peft_type: ClassVar[str] = "TEST_OPTIONAL"

    drop: InputDropout | None = None
    which: TrainedBiases[str] | None = None
    count: Size | None = 3


@dataclass
class Nested:
    """Has names of types inside of annotations, and attributes with the names of types."""

    sizes: list["Size"]  # noqa: UP037  # a forward reference inside, on purpose
    own: Number = 1.0

    def Number(self) -> None:  # noqa: N802  # the name of a type, on purpose
        """Hides no type of the module."""


@dataclass
class WideFirst:
    x: Number | UpTo10 = 1.0


@dataclass
class NarrowFirst:
    x: UpTo10 | Number = 1.0


def test_an_option_that_a_subclass_declares_again_keeps_its_role() -> None:
    assert options_for(Again, Role.BIASES) == ("bias",)
    assert options_for(Again, Role.DROPOUT) == ("lora_dropout",)
    assert "fan_in_fan_out" in Again().editable
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), Again(target_modules=["0"], bias="lora_only"))
    assert model[0].bias.requires_grad


def test_an_option_that_may_be_none_has_its_role_and_its_bounds() -> None:
    assert options_for(Optional, Role.DROPOUT) == ("drop",)
    assert options_for(Optional, Role.BIASES) == ("which",)
    assert sizes_of(Optional()) == {"count": 3}
    with pytest.raises(ValueError, match="drop must be a probability, 0 ≤ p ≤ 1, not 2"):
        Optional(drop=2.0)


def test_types_inside_of_annotations_are_those_of_the_module() -> None:
    check_options(Nested([1]))
    with pytest.raises(ValueError, match=r"sizes\[0\] must be a positive integer, not 0"):
        check_options(Nested([0]))


def test_of_several_types_the_first_that_fits_bounds_a_number() -> None:
    check_options(WideFirst(5.0))
    with pytest.raises(ValueError, match="x must be 10 at most, not 100"):
        check_options(NarrowFirst(100))


@dataclass(frozen=True)
class Shift(DeltaRule):
    """Adds a matrix, in a branch whose input has dropout."""

    adapts: ClassVar[tuple[type, ...]] = (ops.Linear,)

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"shift": ParameterSpec(site.matrix_shape, key="shift")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["shift"].fill_(1)

    def delta(self, shift: Any) -> Any:
        return shift


@dataclass(kw_only=True)
class ShiftConfig(Optional):
    """Drops by the role alone."""

    peft_type: ClassVar[str] = "TEST_SHIFT"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Any:
        return Shift()


@pytest.mark.parametrize("drop", [None, 0.5])
def test_a_branch_drops_by_the_option_for_it(drop: float | None) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 4)), ShiftConfig(target_modules=["0"], drop=drop))
    x = torch.ones(1, 64)
    assert torch.equal(model(x), model(x)) == (drop is None)
    assert torch.equal(model.eval()(x), model(x))
