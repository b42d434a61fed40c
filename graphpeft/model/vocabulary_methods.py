"""The method of an adapted model that gives another size to what has a row for each token."""

from __future__ import annotations

from typing import Any

from graphpeft.adapters.adapting import modules_of
from graphpeft.adapters.resizing import refuse_resizing
from graphpeft.model.adapter_info import AdapterInfo


class VocabularyMethods(AdapterInfo):
    """The methods of an adapted model that can have a vocabulary of another size."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
    ) -> Any:
        """Gives the model a vocabulary of another size by its own ``resize_token_embeddings``.

        Args:
            new_num_tokens: The new size; None leaves it.
            pad_to_multiple_of: What the new size is a multiple of; None doesn't round it up.
            **options: Further keyword arguments of the model's own.

        Returns:
            What the model's own returns: its embedding.

        Raises:
            AdaptError: If an adapter is on a layer that is exchanged or resized; the model is unchanged then.
        """
        base: Any = super()
        refuse_resizing(modules_of(self), self._peft_adapters, new_num_tokens, pad_to_multiple_of)
        if pad_to_multiple_of is not None:
            options["pad_to_multiple_of"] = pad_to_multiple_of
        return base.resize_token_embeddings(new_num_tokens, **options)
