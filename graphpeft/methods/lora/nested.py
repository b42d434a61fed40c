"""Options of LoRA that have options of their own, each with a class of PEFT's name."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from graphpeft.methods.lora.init.corda import CordaConfig
from graphpeft.methods.lora.init.eva_directions import EvaConfig
from graphpeft.methods.lora.init.from_weight import LoftQConfig
from graphpeft.methods.lora.init.lora_ga import LoraGAConfig
from graphpeft.methods.lora.variants import kinds
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.options import check_options
from graphpeft.wording import shown

OF_INITIALISATIONS: dict[str, tuple[str, type]] = {
    "corda_config": ("corda", CordaConfig),
    "eva_config": ("eva", EvaConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
    "loftq_config": ("loftq", LoftQConfig),
}
"""The options that have options of their own, with the `init_lora_weights` that they are for."""


def give_classes(config: Any) -> None:
    """Gives the options that have options of their own the classes of these, in place."""
    for name, (_, config_class) in OF_INITIALISATIONS.items():
        setattr(config, name, _nested(getattr(config, name), config_class, name))
    for name, config_class in kinds.NESTED.items():
        value = getattr(config, name)
        # a variant is asked for by its options, if only by their defaults
        setattr(config, name, config_class() if value == {} else _nested(value, config_class, name))


def warn_of_unused(config: Any) -> None:
    """Warns of nested options of other initialisations than the config's own."""
    for name, (kind, _) in OF_INITIALISATIONS.items():
        if getattr(config, name) and config.init_lora_weights != kind:
            # files that PEFT has converted to plain LoRA have such options
            warnings.warn(
                f"{name} has no effect unless init_lora_weights is {kind!r}, so it is ignored; leave it out",
                PeftWarning,
                stacklevel=5,
            )


def drop_unused(config: Any) -> None:
    """Takes out nested options of other initialisations than the config's own, in place."""
    for name, (kind, _) in OF_INITIALISATIONS.items():
        if config.init_lora_weights != kind:
            setattr(config, name, {} if name == "loftq_config" else None)


def _nested(value: Any, config_class: type, name: str) -> Any:
    """Returns nested options as an instance of `config_class`, from a dict or from PEFT's class for them."""
    if not value or isinstance(value, config_class):
        return value
    values = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = dataclasses.asdict(value)
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a {config_class.__name__}, a dict of its values or None, not {shown(value)}")
    fields = dataclasses.fields(config_class)
    known = {field.name for field in fields if field.init}
    unknown = [key for key in values if key not in {field.name for field in fields}]
    if unknown:
        raise ValueError(f"{name} has no option {shown(unknown[0])}; it has {', '.join(sorted(known))}")
    try:
        made = config_class(**{key: value for key, value in values.items() if key in known})
        given = {key: value for key, value in values.items() if key not in known}
        vars(made).update(given)
        check_options(made)
        return made
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
