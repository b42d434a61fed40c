"""``model.base_model.model``, by which code that knows PEFT's two wrappers finds the model inside of them.

No module is around an adapted model. Its `base_model` is the model itself, and so is the `model` of that. Transformers'
models have a `base_model` of their own, the body below a head; it gets this `model` besides.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from graphpeft.graph import in_place


class Body:
    """The body of a Transformers model in all but its type and one attribute: `model` is the adapted model.

    Args:
        body: The body.
        model: The adapted model.
    """

    def __init__(self, body: nn.Module, model: nn.Module) -> None:
        vars(self).update(_body=body, model=model)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The body's class, for ``isinstance``."""
        return type(self._body)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_body"], name)

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
