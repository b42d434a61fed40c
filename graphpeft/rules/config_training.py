"""The part of `PeftConfig` for methods that do more than compute while their adapters are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from graphpeft.rules.trained import SiteParameters


class ConfigTraining:
    """The functions of a config by which an adapter changes from step to step."""

    changed_by_training: ClassVar[frozenset[str]] = frozenset()
    """Options that `after_step` changes: an adapter that gets the values of a saved one gets its options of these."""

    parameters_changed_by_steps: ClassVar[frozenset[str] | None] = None
    """The rules' names of the parameters that `after_step` changes; None if it may change any, which costs copies."""

    def penalty(self, sites: Sequence[SiteParameters]) -> torch.Tensor | None:
        """Returns a scalar with gradients that a model's call adds to the loss that it returns, or None.

        Args:
            sites: The adapter's parameters at each of its sites.
        """
        return None

    def after_step(self, step: int, sites: Sequence[SiteParameters]) -> None:
        """Changes the adapter's tensors in place after a training step, when `update_and_allocate` is called.

        Keep state between steps in attributes of the config, and assign a new value instead of mutating the old one. If
        the call fails, attributes and tensors are restored.

        Args:
            step: The number of the step, counted by the caller.
            sites: The adapter's parameters at each of its sites, with gradients.

        Raises:
            ValueError: If the adapter can't be changed now.
        """

    def rests(self, site: Any, name: str) -> bool:
        """Returns whether a parameter isn't trained now, of those that the rule trains: `after_step` may choose.

        Args:
            site: The site.
            name: The rule's name of the parameter.
        """
        return False

    def training_state(self) -> Mapping[str, torch.Tensor]:
        """Returns what `after_step` keeps from step to step, as tensors by name, for a training that is resumed."""
        return {}

    def resumed(self, state: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """Returns the attributes of the config in which `after_step` keeps this.

        Args:
            state: The result of `training_state`.

        Raises:
            ValueError: If it is another method's.
        """
        raise ValueError(f"{type(self).__name__} keeps nothing from step to step")
