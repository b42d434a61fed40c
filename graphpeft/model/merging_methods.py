"""The methods of an adapted model that add adapters to the weights, and that take adapters off."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from graphpeft.adapters import dequantising, lifecycle, merged_codes, merging
from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.adapters.untying import telling_of_untied, untie_saved
from graphpeft.graph.autocast import in_own_precision
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.peft_errors import PeftWarning
from graphpeft.transaction import transaction
from graphpeft.wording import joined


class MergingMethods(AdapterInfo):
    """The part of `PeftModel` that merges adapters and unloads them."""

    def unload(self) -> Any:
        """Takes all adapters off, and leaves the active ones' copies of `modules_to_save` in the model, as PEFT does.

        A copy's tensors take the places of the base's, so that a tensor that was tied to one of these no longer is. To
        get the base itself, call ``set_adapter([])`` before. A forward that runs in another thread may see the change
        half done, see `PeftModel`.

        Returns:
            This model, exactly as it was before its first adapter but for these copies.
        """
        state = self._peft_adapters
        with transaction(self), telling_of_untied(self):
            lifecycle.unload(self, state, lifecycle.copies_of_saved(modules_of(self), state))
        return self

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> Any:
        """Adds adapters to the weights and takes all adapters off.

        A copy of each changed weight is kept until the call ends, in main memory if the weight is on an accelerator. A
        forward that runs in another thread may see the change half done, see `PeftModel`. The sum of a quantised weight
        and its change is quantised as the weight was, as in PEFT, with a warning, since that rounds it.

        Args:
            progressbar: Accepted for compatibility with PEFT; merging is one addition for each weight.
            safe_merge: Whether to refuse merged weights with infinities or NaNs.
            adapter_names: The adapters to merge; the active ones if None.
            dequantize: Whether all quantised linear layers become plain ones, ``nn.Linear``, whose weights have the
                dtype of the model's other parameters. Then nothing is rounded to codes again. It isn't an argument of
                PEFT's.

        Returns:
            This model, without adapters.

        Raises:
            AdaptError: If the model has no adapter of a name, an adapter can't be merged (for example since its weight
                is tied to another one), two adapters fully train the same tensor, or a merged weight isn't finite.
                Nothing is merged then.
            TypeError: If `adapter_names` is one string; nothing is merged.
        """
        state, modules = self._peft_adapters, modules_of(self)
        names = _to_merge(self, adapter_names)
        with transaction(self), telling_of_untied(self), in_own_precision(modules):
            names = [*state.merged, *names]
            untie_saved(modules, state, names)
            merging.merge(modules, state, names)
            numbers = merged_codes.merged(modules, state, names) if dequantize else {}
            if not dequantize:
                merged_codes.merge(modules, state, names)
            if safe_merge:
                merging.refuse_infinite(modules, state, names)
            lifecycle.unload(self, state, left={})
            if dequantize:
                dequantising.dequantise(modules_of(self), numbers)
        return self

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Adds adapters to the weights until `unmerge_adapter`, which restores the weights bit for bit.

        A merged adapter has no nodes in the graphs, so the forward is the base's. A copy of each changed weight is kept
        meanwhile. Adapters that are active and not merged go on acting. A forward that runs in another thread may see
        the change half done, see `PeftModel`. Quantised weights are quantised anew, see `merge_and_unload`, and
        `unmerge_adapter` restores their very codes.

        Args:
            adapter_names: The adapters to merge; the active ones if None. Adapters that are merged already are left
                out, with a warning.
            safe_merge: Whether to refuse merged weights with infinities or NaNs.

        Raises:
            AdaptError: If adapters are disabled, the model has no adapter of a name, an adapter can't be merged (for
                example since its weight is tied to another one), two adapters fully train the same tensor, or a merged
                weight isn't finite. Nothing is merged then.
            TypeError: If `adapter_names` is one string; nothing is merged.
        """
        state, modules = self._peft_adapters, modules_of(self)
        names = _to_merge(self, adapter_names)
        with transaction(self), in_own_precision(modules):
            merging.merge_in_place(modules, state, names)
            if safe_merge:
                merging.refuse_infinite(modules, state, names)

    def unmerge_adapter(self) -> None:
        """Takes all merged adapters out of the weights; the active ones act by nodes again.

        A weight that has changed since it was merged into keeps its change: the adapters' changes are subtracted from
        it. Without a merged adapter it only warns. A forward that runs in another thread may see the change half done,
        see `PeftModel`.

        Raises:
            AdaptError: If a weight has changed and an adapter's change of it depends on the weight itself, tensors of
                merged adapters have changed, too, or the weight is no parameter any more; nothing is unmerged then.
        """
        if not self._peft_adapters.merged:
            warnings.warn("no adapter is merged, so there is nothing to unmerge", PeftWarning, stacklevel=2)
        with transaction(self):
            merging.unmerge(modules_of(self), self._peft_adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether `convert_to_lora` can make plain LoRA of an adapter: it changes weights, and nothing else.

        Args:
            adapter_name: The adapter's name.

        Raises:
            AdaptError: If the model has no adapter of this name.
        """
        return known_adapter(self, adapter_name).is_change_of_weights


def _to_merge(model: AdapterInfo, names: Sequence[str] | None) -> list[str]:
    """Returns the adapters to merge; it warns of those that are merged already, as PEFT does, and leaves them out."""
    if isinstance(names, str):
        raise TypeError(f"adapter_names is the text {names!r}; pass a list of names, [{names!r}]")
    wanted = list(dict.fromkeys(model.active_adapters if names is None else names))
    for name in wanted:
        known_adapter(model, name)
    merged = model._peft_adapters.merged
    unmerged = [name for name in wanted if name not in merged]
    if wanted and not unmerged:
        warnings.warn(f"All adapters are already merged, nothing to do: {joined(wanted)}", PeftWarning, stacklevel=3)
    elif unmerged and merged:
        warnings.warn(
            f"{joined(merged)} are merged already; {joined(unmerged)} are merged beside them",
            PeftWarning,
            stacklevel=3,
        )
    return unmerged
