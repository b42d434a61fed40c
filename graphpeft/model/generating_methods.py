"""The methods of an adapted model that generates text."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from graphpeft.adapters import mixing
from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.graph import call_inputs
from graphpeft.model.adapter_info import AdapterInfo


class GeneratingMethods(AdapterInfo):
    """The methods of an adapted model that generates text."""

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generates tokens with the model's own ``generate``.

        Args:
            *args: Positional arguments of the model's ``generate``.
            adapter_names: The adapter of each row of the batch, active or not: its name, or ``"__base__"`` for the base
                model.
            **kwargs: Keyword arguments of the model's ``generate``.

        Returns:
            The result of the model's ``generate``.
        """
        base: Any = super()
        read = self._peft_adapters.call_inputs
        settings = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        repeats = [
            kwargs.get(name, getattr(settings, name, None)) or 1 for name in ("num_beams", "num_return_sequences")
        ]
        if max(repeats) > 1 and not kwargs.keys().isdisjoint(read):
            raise AdaptError(f"{sorted(read)} are those of a batch, whose rows generate() would repeat; use one beam")
        own = call_inputs.left(read, kwargs)
        acting = self.active_adapters if adapter_names is None else adapter_names
        configs = self.peft_config
        those = [configs[name] for name in acting if name in configs]
        # a prefix is in the cache for the model alone
        is_behind_prefix = any(each.is_by_token for each in those) and any(each.is_prompt_learning for each in those)
        kind = kwargs.get("cache_implementation", getattr(settings, "cache_implementation", None))
        is_too_small = kind not in _GROWING and any(each.adds_to_caches for each in those)
        if is_behind_prefix or is_too_small or not all(each.goes_on_from_caches for each in those):
            own["use_cache"] = False
        possible = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if read else ()
        prompt = next((tokens for tokens in possible if isinstance(tokens, torch.Tensor)), None)
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                rows = mixing.mixed(lambda: modules_of(self), self._peft_adapters, adapter_names, max(repeats))
                stack.enter_context(rows)
            stack.enter_context(call_inputs.given(read, kwargs))
            if prompt is not None:
                stack.enter_context(call_inputs.PROMPT.during(prompt))
            return base.generate(*args, **own)


_GROWING = (None, "dynamic", "dynamic_full")
"""The names of caches that can have other layers beside the model's."""
