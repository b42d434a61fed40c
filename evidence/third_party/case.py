"""Models of packages that know nothing of adapters, built from configs with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class Case(NamedTuple):
    """A model that both libraries adapt.

    Attributes:
        package: The package that it is of, by its name in the registry.
        name: Its name there, with a part or an option where a package has several.
        build: Builds it; equal seeds give equal weights.
        inputs: Makes its inputs, positional ones or by name; equal seeds give equal ones.
        layers: Classes of layers that are adapted beside the linear ones.
        note: What there is to say of what was measured.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]
    layers: tuple[type[nn.Module], ...] = ()
    note: str = ""

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return f"{self.package}/{self.name}"


def with_other_values(model: nn.Module, *unset: str) -> nn.Module:
    """Gives other values to parameters that are zero, through which no gradient goes, and to those without values.

    Args:
        model: The model.
        unset: The paths of parameters that hold memory as it was found.
    """
    for path, parameter in model.named_parameters():
        if path in unset or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model
