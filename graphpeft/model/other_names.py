"""PEFT's names that a model's own code may use for something else; an adapted model has those that are free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graphpeft.adapters import lifecycle
from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.trainable import set_trainable_now
from graphpeft.graph import in_place
from graphpeft.graph.holders import HolderGroup
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.transaction import transaction


class OtherNames(AdapterInfo):
    """The members that an adapted model has unless it has others of these names."""

    @property
    def base_model(self) -> Any:
        """The model itself, or the body of a Transformers model; its `model` is this model."""
        return base_model(self)

    @property
    def model(self) -> nn.Module:
        """The model itself, as the `model` of `base_model`."""
        return self

    @property
    def prefix(self) -> str:
        """How the names of tensors of the first active adapter begin, such as ``"lora_"``.

        Raises:
            AttributeError: If its method's names have no common beginning.
        """
        found = self.active_peft_config.prefix
        if found is None:
            raise AttributeError(f"the tensors of {self.active_peft_config.method} have no common prefix")
        return found

    @property
    def prompt_encoder(self) -> Any:
        """The virtual tokens of each adapter with a prompt, or what computes them: modules with its tensors, by name.

        Where several modules have a prompt, an adapter has a list of them.

        Raises:
            AttributeError: If no adapter has a prompt.
        """
        own = self._modules.get("prompt_encoder")
        if own is not None:
            # as graphs read it
            return own
        modules, found = modules_of(self), {}
        for name, adapter in self._peft_adapters.by_name.items():
            places = dict.fromkeys((adapted.site.owner, adapted.rule.held_in) for adapted in adapter.sites)
            groups = [modules[path]._modules.get(group) for path, group in places if path in modules]
            holders = [group[name] for group in groups if isinstance(group, HolderGroup) and name in group]
            if adapter.config.is_prompt_learning and holders:
                found[name] = holders[0] if len(holders) == 1 else nn.ModuleList(holders)
        if not found:
            raise AttributeError("no adapter has a prompt, whose encoder there could be")
        return nn.ModuleDict(found)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The entries of `modules_to_save` of all adapters; None if there are none."""
        entries = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return entries or None

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether the tensors of adapters require gradients, active or not, until other adapters are activated.

        Args:
            adapter_names: The name of an adapter, or a list of names.
            requires_grad: Whether they require gradients.

        Raises:
            AdaptError: If the model has no adapter of a name, or one that was loaded for inference can't be trained;
                the model is unchanged then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        modules = modules_of(self)
        for name in names:
            adapter = known_adapter(self, name)
            if requires_grad:
                lifecycle.refuse_untrainable(modules, adapter, name)
        with transaction(self):
            set_trainable_now(modules, self._peft_adapters, dict.fromkeys(names, requires_grad))


def free_names(model: Any) -> tuple[str, ...]:
    """Returns those of the names that `model` has no attribute of, and `base_model` if that is Transformers'."""
    offered = [name for name, member in vars(OtherNames).items() if isinstance(member, property) or callable(member)]
    free = [name for name in offered if not name.startswith("_") and not hasattr(model, name)]
    own = getattr(in_place.original_class(model), "base_model", None)
    return (*free, "base_model") if isinstance(own, property) else tuple(free)


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
