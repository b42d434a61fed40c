"""``model.base_model.model``, by which code that knows PEFT's two wrappers finds the model inside of them.

No module is around an adapted model. Its `base_model` is the model itself, and so is the `model` of that. Transformers'
models have a `base_model` of their own, the body below a head; it gets this `model` besides, and what PEFT's inner
wrapper does with adapters, such as ``model.base_model.set_adapter(["one", "two"])``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from graphpeft.graph import in_place

OF_ADAPTERS = frozenset(
    {
        "active_adapter",
        "active_adapters",
        "add_weighted_adapter",
        "delete_adapter",
        "disable_adapter_layers",
        "enable_adapter_layers",
        "merge_adapter",
        "merge_and_unload",
        "peft_config",
        "prefix",
        "set_adapter",
        "targeted_module_names",
        "targeted_parameter_names",
        "unload",
        "unmerge_adapter",
    }
)
"""The members of PEFT's inner wrapper that are about adapters; here, the adapted model has them."""


class Body:
    """The body of a Transformers model in all but its type, `model`, which is the adapted model, and `OF_ADAPTERS`.

    A part that the body lacks, such as the head, is the adapted model's, as in PEFT's inner wrapper.
    """

    def __init__(self, body: nn.Module, model: nn.Module) -> None:
        vars(self).update(_body=body, model=model)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The body's class, for ``isinstance``."""
        return type(self._body)

    def __getattr__(self, name: str) -> Any:
        body, model = (vars(self)[own] for own in ("_body", "model"))
        return getattr(model if name in OF_ADAPTERS or not hasattr(body, name) else body, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._body, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the body."""
        return self._body(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self._body is other or (type(other) is Body and self._body is other._body)

    def __hash__(self) -> int:
        return hash(self._body)

    def __repr__(self) -> str:
        return repr(self._body)

    def __deepcopy__(self, memo: dict[int, Any]) -> Body:
        raise TypeError("a base_model isn't copied without its model; copy the model, or the module that it shows")


def base_model(model: Any) -> Any:
    """Returns what an adapted model has as its `base_model`."""
    own = getattr(in_place.original_class(model), "base_model", None)
    body = own.fget(model) if isinstance(own, property) and own.fget is not None else model
    # Transformers compares it with the model by identity
    return body if body is model else Body(body, model)
