"""Puts virtual tokens in front of the input of a Transformers model, as nodes at the boundary of its graph.

    inputs_embeds  = [prompt; embedding(input_ids)]
    attention_mask = [1 … 1; attention_mask]          labels = [-100 … -100; labels], where the outputs are tokens

Inputs that aren't given stay absent; `position_ids` are dropped, and the model counts the longer sequence itself. While
text is generated, the prompt goes in when the cache is empty; the attention mask is lengthened at each step. In a model
with an encoder and a decoder the prompt goes into the encoder, and the decoder gets a longer mask for the encoder's
output. The same numbers as PEFT's ``peft_model.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.methods.prompts.caches import CACHES, absent, cache_of, has_tokens, length_with, under_one_name
from graphpeft.methods.prompts.encoders import Encoder
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.rule import BoundaryRule
from graphpeft.sites.site import CallSite
from graphpeft.wording import number_of

LABELS, POSITIONS = "labels", ("start_positions", "end_positions")
"""The arguments that hold the answers: labels of tokens, and places of an answer in the text."""


class Placement(ABC):
    """Where virtual tokens go at a boundary; a frozen value.

    Attributes:
        spends: The arguments by which nobody can tell any more that a sequence begins, once tokens are placed.
    """

    spends: ClassVar[tuple[str, ...]] = ()

    @property
    def asks(self) -> tuple[str, ...]:
        """The names of arguments that the module gets for it, beside its own."""
        return ()

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take virtual tokens, or None."""
        return None

    @abstractmethod
    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Returns the new values of arguments, by name; it is run on proxies.

        Args:
            prompt: The virtual tokens, (tokens, dim) or (batch, tokens, dim).
            inputs: The arguments by name.
            word_embeddings: The module that embeds tokens, or None in a scope.
            config: The model's config, or None in a scope.
        """
        ...

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the new value of the module's output; by default, the output.

        Args:
            output: The output.
            inputs: The arguments by name.
            entered: The new values that `enter` has returned.
        """
        return output


@dataclass(frozen=True)
class PromptRule(BoundaryRule):
    """The rule of all prompt methods: an encoder computes virtual tokens, and a placement inserts them.

    Attributes:
        encoder: Computes them.
        placement: Inserts them.
    """

    held_in: ClassVar[str] = "prompt_encoder"

    # an empty cache tells that a sequence begins, and one that a prefix has filled tells nothing
    reads_as_given: ClassVar[tuple[str, ...]] = CACHES

    encoder: Encoder
    placement: Placement

    @property
    def spends(self) -> tuple[str, ...]:
        """What the placement spends."""
        return self.placement.spends

    @property
    def more_inputs(self) -> tuple[str, ...]:
        """The arguments that both ask for."""
        return (*self.encoder.asks, *self.placement.asks)

    def check(self, site: CallSite, config: Any) -> str | None:
        """Returns the reason why the module can't take the virtual tokens, or None."""
        return self.placement.check(site)

    def parameters(self, site: CallSite, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the encoder's parameters."""
        return self.encoder.parameters(config)

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        """Fills new parameters with the encoder's first values."""
        self.encoder.initialise(parameters, config, module)

    def enter(
        self,
        inputs: Mapping[str, Any],
        training: Any,
        word_embeddings: Any = None,
        config: Any = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Computes the virtual tokens and places them."""
        asked = {name: inputs[name] for name in self.encoder.asks}
        prompt = self.encoder.encode(parameters, training, **asked)
        return self.placement.enter(prompt, inputs, word_embeddings, config)

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the placement's value of the output."""
        return self.placement.leave(output, inputs, entered)


@dataclass(frozen=True)
class Prepended(Placement):
    """In front of the tokens that a Transformers model reads.

    Attributes:
        tokens: The number of virtual tokens.
        follows: The names of arguments that are by token, and are moved behind the prompt: labels, and positions.
        positions: The number of positions in the model's table; None without a table.
        cache_names: The other name of its cache, if its forward takes one.
    """

    tokens: int
    follows: tuple[str, ...]
    positions: int | None
    cache_names: tuple[str, ...] = ()

    @property
    def asks(self) -> tuple[str, ...]:
        """The other name of the cache."""
        return self.cache_names

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take a prompt, or None."""
        if "inputs_embeds" not in site.arguments:
            return "its forward has no argument inputs_embeds"
        return exceeds_positions(self.tokens, self.positions)

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the virtual tokens in front, and lengthens masks, types and labels."""
        past = cache_of(inputs)
        changed = under_one_name(past, inputs) if self.asks else {}
        embedded = embeddings_of(inputs["input_ids"], inputs["inputs_embeds"], word_embeddings)
        changed["input_ids"] = absent(inputs["input_ids"])
        changed["inputs_embeds"] = prepended(prompt, self.tokens, embedded, past, self.positions)
        if "attention_mask" in inputs:
            changed["attention_mask"] = lengthened_for(inputs["attention_mask"], self.tokens, embedded, past)
        if "token_type_ids" in inputs:
            changed["token_type_ids"] = lengthened_at_first(inputs["token_type_ids"], self.tokens, 0, past)
        if "position_ids" in inputs:
            changed["position_ids"] = absent(checked_positions(inputs["position_ids"], self.tokens, embedded, past))
        if LABELS in self.follows and LABELS in inputs:
            changed[LABELS] = lengthened_at_first(inputs[LABELS], self.tokens, -100, past)
        for name in POSITIONS:
            if name in self.follows and name in inputs:
                changed[name] = shifted(inputs[name], self.tokens)
        return changed


@dataclass(frozen=True)
class InEncoding(Placement):
    """In the output of an encoder, which has the virtual tokens: the decoder's mask for it gets longer.

    Attributes:
        tokens: The number of virtual tokens.
    """

    tokens: int

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the decoder can't read a longer encoding, or None."""
        has_mask = "encoder_attention_mask" in site.arguments
        return None if has_mask else "its forward has no argument encoder_attention_mask"

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Lengthens the mask for the encoder's tokens."""
        return {"encoder_attention_mask": lengthened(inputs["encoder_attention_mask"], self.tokens, 1)}


def exceeds_positions(tokens: int, positions: int | None) -> str | None:
    """Returns the reason why a prompt doesn't fit into a table of positions, or None; without a table it fits."""
    if positions is None or tokens < positions:
        return None
    return f"a prompt of {number_of(tokens, 'token')} leaves no room in its table of {number_of(positions, 'position')}"


# nodes


@recorded
def embeddings_of(input_ids: Tensor | None, inputs_embeds: Tensor | None, word_embeddings: nn.Module) -> Tensor:
    """Returns the embeddings of the tokens, (batch, tokens, dim), from ids or as they were given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds to a model with a prompt, and not both")
    return word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds


@recorded
def prepended(prompt: Tensor, tokens: int, embeddings: Tensor, cache: Any, positions: int | None) -> Tensor:
    """Puts the first virtual tokens in front of each sequence, unless the cache has them already.

    Args:
        prompt: The virtual tokens, (tokens, dim) or (batch, tokens, dim).
        tokens: The number of these tokens.
        embeddings: The sequences, (batch, length, dim).
        cache: The model's cache, or None.
        positions: The number of positions for which the model has a table, or None.

    Raises:
        ValueError: If there are more tokens than positions.
    """
    if has_tokens(cache):
        return embeddings
    if positions is not None and tokens + embeddings.shape[1] > positions:
        raise ValueError(
            f"{number_of(tokens, 'virtual token')} and {embeddings.shape[1]} of the input are more than the "
            f"{positions} positions that the model has a table for; shorten the input"
        )
    batch = prompt[..., :tokens, :].to(embeddings.dtype).expand(embeddings.shape[0], -1, -1)
    return torch.cat((batch, embeddings), dim=1)


@recorded
def lengthened(mask: Tensor | None, tokens: int, value: int) -> Tensor | None:
    """Puts `tokens` times `value` in front of each row of a mask, (batch, tokens)."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, and a prompt lengthens masks of (batch, tokens) only; "
            "a static cache makes other ones: leave cache_implementation out"
        )
    return F.pad(mask, (tokens, 0), value=value)


@recorded
def lengthened_for(mask: Tensor | None, tokens: int, embeddings: Tensor, cache: Any) -> Tensor | None:
    """Lengthens a mask of the tokens in the cache and of the input, (batch, length, …), by ones.

    Raises:
        ValueError: If the mask is of more or fewer tokens.
    """
    longer = lengthened(mask, tokens, 1)
    if longer is not None and longer.shape[1] != length_with(cache, embeddings, longer.shape[1]):
        raise ValueError(_cut(longer.shape[1], length_with(cache, embeddings, 0), "the attention mask"))
    return longer


@recorded
def checked_positions(position_ids: Tensor | None, tokens: int, embeddings: Tensor, cache: Any) -> Tensor | None:
    """Returns positions as they are, (batch, length).

    Raises:
        ValueError: If they go beyond the last token.
    """
    # the largest position is a tensor's value, which no compiled graph can ask for
    if position_ids is None or not has_tokens(cache) or torch.compiler.is_compiling():
        return position_ids
    most = int(position_ids.max()) + 1 + tokens
    if most > length_with(cache, embeddings, most):
        raise ValueError(_cut(most, length_with(cache, embeddings, most), "position_ids"))
    return position_ids


def _cut(told: int, there: int, by: str) -> str:
    return (
        f"there are {told} tokens by {by}, and {there} in the cache and the input, with those of the prompt: generate "
        "cuts off as many tokens as a cache has, of which some are virtual; call generate without a cache"
    )


@recorded
def lengthened_at_first(values: Tensor | None, tokens: int, value: int, cache: Any) -> Tensor | None:
    """Puts `tokens` times `value` in front of each row, (batch, tokens), if the prompt goes in now."""
    return values if values is None or has_tokens(cache) else F.pad(values, (tokens, 0), value=value)


@recorded
def shifted(positions: Tensor | None, tokens: int) -> Tensor | None:
    """Returns positions, moved behind the virtual tokens."""
    return None if positions is None else positions + tokens
