"""The functions that adapt a model by each method, in the place of PEFT's table of classes that wrap one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from graphpeft.model.adapt import get_peft_model
from graphpeft.model.injecting import inject_adapter_in_model
from graphpeft.rules.given_config import ConfigLike
from graphpeft.rules.registry import PEFT_TYPE_TO_CONFIG_MAPPING


class Tuner:
    """Adapts models by one method, called as PEFT's class of the method is.

    Attributes:
        config_class: The method's config class.
        uses_shared_state: Whether a model can't be injected with an adapter of it; each can here.
    """

    uses_shared_state = False

    def __init__(self, config_class: Any) -> None:
        self.config_class = config_class

    @property
    def prefix(self) -> str | None:
        """How the names of the method's tensors begin; None if they vary."""
        return self.config_class.prefix

    def __call__(
        self,
        model: nn.Module,
        peft_config: ConfigLike | Mapping[str, ConfigLike],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> Any:
        """Adapts a model in place by a config of the method.

        Args:
            model: The model.
            peft_config: The config, or a mapping that has it by the adapter's name.
            adapter_name: The adapter's name.
            low_cpu_mem_usage: As in `get_peft_model`.
            state_dict: As in `inject_adapter_in_model`.

        Returns:
            `model` itself.

        Raises:
            TypeError: If the config is another method's.
        """
        config: Any = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        if config.peft_type != self.config_class.peft_type:
            raise TypeError(f"the config is a {type(config).__name__}; pass a {self.config_class.__name__}")
        if state_dict is not None:
            return inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict)
        return get_peft_model(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)

    def __repr__(self) -> str:
        return f"Tuner({self.config_class.__name__})"


class _Tuners(Mapping[str, Tuner]):
    """The tuners of all methods by `peft_type`, those of a user's own among them."""

    def __getitem__(self, peft_type: str) -> Tuner:
        return Tuner(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])

    def __iter__(self) -> Iterator[str]:
        return iter(PEFT_TYPE_TO_CONFIG_MAPPING)

    def __len__(self) -> int:
        return len(PEFT_TYPE_TO_CONFIG_MAPPING)


PEFT_TYPE_TO_TUNER_MAPPING: Mapping[str, Tuner] = _Tuners()
"""The function that adapts a model by each method, by its `peft_type`, called as PEFT's classes of the methods are.

Examples:
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> tuner = PEFT_TYPE_TO_TUNER_MAPPING["LORA"]
    >>> tuner(model, LoraConfig(target_modules=["0"]), "default") is model
    True
"""
