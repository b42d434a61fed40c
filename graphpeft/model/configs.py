"""The configs of a model's adapters by name, as they are at any time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from graphpeft.adapters.state import Adapters
from graphpeft.rules.config import PeftConfig


class Configs(Mapping[str, PeftConfig]):
    """The configs of a model's adapters by name, in the order in which these were added.

    It shows adapters that come and go. Options can be set on a config; adapters are added by `add_adapter`.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> PeftConfig:
        return self._adapters.by_name[name].config

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters.by_name)

    def __len__(self) -> int:
        return len(self._adapters.by_name)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __setitem__(self, name: str, config: Any) -> NoReturn:
        raise TypeError(
            f"a config in peft_config is of an adapter with tensors: model.add_adapter({name!r}, config) adds one, and "
            f"single options are set as in model.peft_config[{name!r}].inference_mode = True"
        )

    def __delitem__(self, name: str) -> NoReturn:
        raise TypeError(f"a config goes with its adapter: call model.delete_adapter({name!r})")

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Raises TypeError, as adding a config does; PEFT's own functions update the configs of what they adapt."""
        raise TypeError(
            "the model is adapted by graphpeft, and a config in peft_config is of an adapter with tensors: for another "
            "adapter, call graphpeft.get_peft_model(model, config, name) or model.add_adapter(name, config), and not "
            "PEFT's get_peft_model; or take the adapters off first with unload() or merge_and_unload()"
        )

    def pop(self, name: str, *_: Any) -> NoReturn:
        """Raises TypeError, as deleting a config does."""
        self.__delitem__(name)
