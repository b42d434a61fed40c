"""The config classes of all methods, by `peft_type`, and the options of each class."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from graphpeft.rules.plain_values import default_of, fields_of, plain

ConfigT = TypeVar("ConfigT", bound=type[Any])
_REGISTRY: dict[str, type[Any]] = {}


def register(config_class: ConfigT) -> ConfigT:
    """Registers a method's config class under its `peft_type`, and makes its errors suggest misspelt keywords.

    Args:
        config_class: A dataclass. Its `peft_type` is one of PEFT's, or a name of your own, which PEFT can't read.

    Returns:
        The class.

    Raises:
        TypeError: If it isn't a dataclass, has no `peft_type`, or its `lacks` names an option that it doesn't inherit.
        ValueError: If another class has the same `peft_type`.

    Examples:
        >>> from dataclasses import dataclass
        >>> @register
        ... @dataclass(kw_only=True)
        ... class ShiftConfig(TargetedConfig):
        ...     peft_type = "EXAMPLE_SHIFT"
        ...     amount: float = 1.0
        >>> ShiftConfig(target_modules=["0"], amount=2.0).method
        'EXAMPLE_SHIFT'
    """
    name = getattr(config_class, "peft_type", None)
    if not isinstance(name, str) or not name or "__dataclass_fields__" not in vars(config_class):
        raise TypeError(f"{config_class.__name__} must be a dataclass whose peft_type is the name of its method")
    unknown = sorted(config_class.lacks - {field.name for field in dataclasses.fields(config_class)})
    if unknown:
        raise TypeError(f"{config_class.__name__}.lacks names {unknown[0]!r}, which no base class of it has")
    there = _REGISTRY.get(name)
    # a notebook cell that runs again, or a reloaded module, defines the same class again
    if there is not None and _full_name(there) != _full_name(config_class):
        raise ValueError(f"{name} is the method of {_full_name(there)} already; choose another peft_type")
    _REGISTRY[name] = config_class
    initialise = config_class.__init__
    known = [field.name for field in options(config_class) if field.init]
    # dataclasses.replace passes them on
    defaults = {field.name: default_of(field) for field in dataclasses.fields(config_class) if field.name not in known}

    @functools.wraps(initialise)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        # PEFT's constructors take it
        named = kwargs.pop("peft_type", config_class.peft_type)
        if named not in (None, config_class.peft_type):
            raise ValueError(f"{config_class.__name__} is of the method {plain(name)}; leave peft_type={named!r} out")
        for option, value in kwargs.items():
            if option not in known and not (option in defaults and plain(value) == defaults[option]):
                raise TypeError(f"{config_class.__name__} has no option {option!r}{nearest(option, known)}")
        initialise(self, *args, **kwargs)

    config_class.__init__ = checked
    return config_class


def names_method(config_class: ConfigT) -> ConfigT:
    """Lets a config class that is no method's be made for the method that `peft_type` names, as PEFT's can."""
    initialise = config_class.__init__

    @functools.wraps(initialise)
    def named(self: Any, *args: Any, peft_type: str | None = None, **kwargs: Any) -> None:
        known = next((cls.peft_type for name, cls in _REGISTRY.items() if name == peft_type), None)
        if known is None and peft_type is not None:
            raise ValueError(f"peft_type is {peft_type!r}; supported are {sorted(map(plain, _REGISTRY))}")
        self.peft_type = known
        initialise(self, *args, **kwargs)

    def shown(self: Any) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def equals(self: Any, other: Any) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    methods: dict[str, Any] = {"__init__": named, "__repr__": shown, "__eq__": equals}
    for name, method in methods.items():
        setattr(config_class, name, method)
    return config_class


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[str, type[Any]] = MappingProxyType(_REGISTRY)
"""The config class of every method, by its `peft_type`.

Examples:
    >>> PEFT_TYPE_TO_CONFIG_MAPPING["LORA"].__name__
    'LoraConfig'
"""


def registered() -> dict[str, type[Any]]:
    """Returns the config class of every method, by its `peft_type`."""
    return dict(_REGISTRY)


def options(config: Any) -> list[dataclasses.Field[Any]]:
    """Returns the options of a config or of its class: the fields that `lacks` doesn't name."""
    cls = config if isinstance(config, type) else type(config)
    return [field for field in fields_of(cls) if field.name not in config.lacks]


def nearest(name: str, known: list[str]) -> str:
    """Returns a hint for an error with the most similar option, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
