"""The methods of an adapted model that choose which adapters act: active, deleted, disabled."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from graphpeft.adapters import lifecycle
from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.exchanged import refuse_missing, refuse_removed, refuse_resized
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.trainable import set_trainable, set_trainable_now
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.peft_errors import PeftWarning
from graphpeft.transaction import set_attribute, transaction


class SwitchingMethods(AdapterInfo):
    """The part of `PeftModel` that activates, deletes and disables adapters."""

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters active, and trainable; no other is trainable then.

        Merged adapters are unmerged first, with a warning. A forward that runs in another thread may see the change
        half done, see `PeftModel`.

        Args:
            adapter_name: The name of one adapter, or a list of names.
            inference_mode: Whether the adapters are for inference, so that none of their tensors is trainable.

        Raises:
            AdaptError: If the model has no adapter of a name, two of them fully train the same tensor, one that was
                loaded for inference can't be trained, or a module that one adapts was replaced or resized. The model is
                unchanged then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        configs = [known_adapter(self, name).config for name in names]
        modules, state = modules_of(self), self._peft_adapters
        for name, config in zip(names, configs, strict=True):
            # one that is trained already was asked before
            if config.inference_mode and not inference_mode:
                lifecycle.refuse_untrainable(modules, known_adapter(self, name), name)
        with transaction(self):
            if state.merged:
                lifecycle.unmerge_first(modules, state)  # merged adapters can't be trained
            acted = set(state.slots)
            lifecycle.activate(modules, state, names)
            came = state.slots.keys() - acted
            for name in names:
                adapter = known_adapter(self, name)
                if name in came:  # activating has looked for its tensors
                    refuse_removed(modules, adapter, name)
                else:
                    refuse_missing(modules, adapter, name, reads=False)
                refuse_resized(modules, adapter, name)
            for config in configs:
                set_attribute(config, "inference_mode", inference_mode)
            set_trainable_now(
                modules, state, dict.fromkeys(state.trainable, False) | dict.fromkeys(names, not inference_mode)
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter with its tensors.

        Other active adapters stay active. If the deleted adapter was the only active one, the first of the remaining
        adapters by name becomes active, with a warning, as in PEFT. Merged adapters stay merged, unless another one
        becomes active or the deleted one has replaced tensors of the base; they are unmerged then, with a warning. A
        forward that runs in another thread may see the change half done, see `PeftModel`.

        Args:
            adapter_name: The name of the adapter.

        Raises:
            AdaptError: If the model has no such adapter, or it is merged; the model is unchanged then.
        """
        known_adapter(self, adapter_name)
        modules, state = modules_of(self), self._peft_adapters
        if adapter_name in state.merged:
            raise AdaptError(
                f"{adapter_name!r} is merged into the weights; call unmerge_adapter() before you delete it"
            )
        others = sorted(state.by_name.keys() - {adapter_name})
        with transaction(self):
            if state.active == [adapter_name] and others:
                warnings.warn(
                    f"{adapter_name!r} was active and is deleted; {others[0]!r} is active now",
                    PeftWarning,
                    stacklevel=2,
                )
                lifecycle.activate(modules, state, others[:1])
            lifecycle.remove(modules, state, adapter_name)
            set_trainable(modules, state, state.active)

    def disable_adapters(self) -> None:
        """Disables all adapters until `enable_adapters`, as Transformers' method of this name does.

        Merged adapters are unmerged first. A forward that runs in another thread may see the change half done, see
        `PeftModel`.
        """
        with transaction(self):
            lifecycle.disable(modules_of(self), self._peft_adapters, True)

    def enable_adapters(self) -> None:
        """Ends `disable_adapters`: the active adapters act again; within `disable_adapter`, from the context's end on.

        A forward that runs in another thread may see the change half done, see `PeftModel`.
        """
        with transaction(self):
            lifecycle.disable(modules_of(self), self._peft_adapters, False)

    def disable_adapter_layers(self) -> None:
        """Disables all adapters, as `disable_adapters` does."""
        self.disable_adapters()

    def enable_adapter_layers(self) -> None:
        """Lets the active adapters act again, as `enable_adapters` does."""
        self.enable_adapters()

    def disable_adapter(self) -> contextlib.AbstractContextManager[Any]:
        """Disables all adapters within a context, in all threads and tasks.

        Contexts can overlap and end in any order; adapters act again after the last one. Merged adapters are unmerged
        first. Adapters that are activated, added or deleted within the context act, or don't, after it. Merging is
        refused within it, and `disable_adapters` there holds beyond its end. A forward that runs in another thread may
        see the change half done, see `PeftModel`.

        Returns:
            The context.
        """
        return lifecycle.Paused(self)
