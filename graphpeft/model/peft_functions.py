"""PEFT's own ``get_peft_model_state_dict`` and ``set_peft_model_state_dict`` on a model of this library.

accelerate and trl call them with any instance of ``peft.PeftModel``. They look for PEFT's layers, of which an adapted
model has none, and so they would return nothing and set nothing. Both leave the names to the class that PEFT has for
the config's `peft_type` in a table. So where they ask for a config, they get one with an entry of its own in it. A
release of PEFT that has no such classes raises the `ValueError` that it has for unknown methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from graphpeft.adapters import file_names
from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.state import Adapters
from graphpeft.graph.paths import join, unwrapped
from graphpeft.model.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from graphpeft.peft_classes import tuner_classes
from graphpeft.rules.config import PeftConfig

PLACE = "peft.utils.save_and_load"
"""Where PEFT has the two functions."""

_ENTRY = "an adapter of graphpeft: call graphpeft's own get_peft_model_state_dict or set_peft_model_state_dict"


class ConfigsForPeft(Mapping[str, Any]):
    """The configs that the two functions get, by the adapters' names.

    It iterates over none of them: the functions would take other adapters' tensors out of a state dict by names.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> _Asked:
        classes = tuner_classes()
        if any(hasattr(cls, "_remap_adapter_state_dict_for_load") for cls in classes.values()):
            classes.setdefault(_ENTRY, _Tensors)
        return _Asked(self._adapters.by_name[name].config)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Asked:
    """A config of no method of PEFT's, and without the options after which PEFT would add embeddings by itself."""

    peft_type = _ENTRY
    is_prompt_learning = False

    def __init__(self, config: PeftConfig) -> None:
        self.inference_mode = config.inference_mode


class _Tensors:
    """The answers to PEFT's questions about a method's class."""

    @staticmethod
    def _get_adapter_state_dict(
        model: Any,
        config: _Asked,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # under FSDP's first version, all processes but one have an empty state dict
        return get_peft_model_state_dict(model, state_dict, adapter_name) if state_dict else {}

    @staticmethod
    def _remove_adapter_name_from_key(key: str, adapter_name: str) -> str:
        # PEFT adds embeddings by their names in the model, if it is told to; a prompt's tensors may have no path
        is_of_model = "." in key and not key.startswith("base_model.")
        return PeftConfig.file_prefix + key if is_of_model else key

    @staticmethod
    def _remap_adapter_state_dict_for_load(
        model: Any,
        config: _Asked,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Sets the tensors, and returns the model's own, which it loads into itself afterwards."""
        set_peft_model_state_dict(model, state_dict, adapter_name)
        own = unwrapped(model)
        places = file_names.keys(known_adapter(own, adapter_name), adapter_name, modules_of(own)).values()
        held = own.state_dict()
        return {name: held[name] for place in places if (name := join(*place)) in held}
