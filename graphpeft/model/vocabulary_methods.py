"""The method of an adapted model that gives another size to what has a row for each token."""

from __future__ import annotations

from typing import Any

from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.plan import AdaptError
from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph.traced_model import module_told
from graphpeft.model.adapter_info import AdapterInfo
from graphpeft.targeting.embedding_layers import embedding_layers


class VocabularyMethods(AdapterInfo):
    """The methods of an adapted model that can have a vocabulary of another size."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
    ) -> Any:
        """Gives the model a vocabulary of another size by its own ``resize_token_embeddings``.

        Args:
            new_num_tokens: The new size; None leaves it.
            pad_to_multiple_of: A number of which the new size is a multiple; None doesn't round it up.
            **options: Further keyword arguments of the model's own.

        Returns:
            The result of the model's own: its embedding.

        Raises:
            AdaptError: If an adapter is on a layer that is exchanged or resized; the model is unchanged then.
        """
        base: Any = super()
        refuse_resizing(modules_of(self), self._peft_adapters, new_num_tokens, pad_to_multiple_of)
        if pad_to_multiple_of is not None:
            options["pad_to_multiple_of"] = pad_to_multiple_of
        return base.resize_token_embeddings(new_num_tokens, **options)


def refuse_resizing(modules: Modules, adapters: Adapters, size: int | None, multiple: int | None) -> None:
    """Raises AdaptError if a Transformers model's embeddings can't be resized, since adapters are on them.

    Args:
        modules: The model's modules by path.
        adapters: Its adapters.
        size: How many tokens the vocabulary is to have; None for as many as it has.
        multiple: The number to whose multiple the size is rounded up; None for no rounding.
    """
    embedding = module_told(modules[""], "get_input_embeddings")
    if multiple is None and (size is None or size == getattr(embedding, "num_embeddings", None)):
        return
    layers = embedding_layers(modules)
    for name, adapter in adapters.by_name.items():
        path = next((path for path, _ in adapter.tensor_names(name) if path in layers), None)
        if path is not None:
            raise AdaptError(
                f"adapter {name!r} is on {path}, which resize_token_embeddings exchanges or gives another size: resize "
                "the model before you adapt it, or take the adapters off first with unload() or merge_and_unload()"
            )
