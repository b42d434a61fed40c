"""Methods that an adapted model has, too, while an adapter is active whose config offers them."""

from __future__ import annotations

from typing import Any

from graphpeft.rules.registry import registered


class Offered:
    """A method that the config of the first active adapter offers that has it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        for active in instance.active_adapters:
            offered = instance.peft_config[active].offers(self._name)
            if offered is not None:
                return offered
        raise AttributeError(f"{owner.__name__} has no {self._name} with its active adapters", name=self._name)


def offered_names(model: Any) -> tuple[str, ...]:
    """Returns the names of such methods of all configs, but for those of which `model` has something of its own."""
    names = {name for config_class in registered().values() for name in config_class.offered_names()}
    return tuple(sorted(name for name in names if not hasattr(model, name)))
