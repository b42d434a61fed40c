"""Puts virtual tokens in front of what a Transformers model reads, as nodes at the boundary of its graph.

    inputs_embeds  = [prompt; embedding(input_ids)]
    attention_mask = [1 … 1; attention_mask]          labels = [-100 … -100; labels], where the outputs are tokens

Inputs that aren't given stay absent; `position_ids` are dropped, and the model counts the longer sequence itself. While
text is generated, the prompt goes in when the cache is empty; the attention mask is lengthened at each step. In a model
with an encoder and a decoder the prompt goes into the encoder, and the decoder gets a longer mask for what it reads
there. The numbers are those of PEFT's ``peft_model.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.errors import TraceError
from graphpeft.graph.recorded import recorded
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import BoundaryRule, ParameterSpec
from graphpeft.sites.calls import boundary
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite

EMBEDDINGS_KEY = "prompt_embeddings"
"""The name of the virtual tokens in PEFT's files."""


CACHES = ("cache", "past_key_values")
"""What the forwards of Transformers models call their cache, the newer ones first."""


LABELS, POSITIONS = "labels", ("start_positions", "end_positions")
"""The arguments that say what is right of tokens, and of answers."""


class Encoder(Protocol):
    """What computes the virtual tokens: a frozen value, such as a table or a small network.

    Attributes:
        asks: The names of arguments that the model gets for it, beside its own.
    """

    asks: ClassVar[tuple[str, ...]]

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns its parameters by name."""
        ...

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Fills new parameters with their first values; `embedding` is the model's word embedding."""
        ...

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the virtual tokens, (tokens, dim) or (batch, tokens, dim); it is run on proxies, and on tensors.

        Args:
            parameters: Its parameters by name.
            training: Whether the model is trained.
            asked: The arguments for which it asks.
        """
        ...


class Placement(Protocol):
    """Where virtual tokens go at a boundary: a frozen value."""

    @property
    def asks(self) -> tuple[str, ...]:
        """The names of arguments that the module gets for it, beside its own."""
        ...

    def check(self, site: CallSite) -> str | None:
        """Returns why the module can't take them, or None."""
        ...

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Returns the new values of arguments, by name; it is run on proxies.

        Args:
            prompt: The virtual tokens.
            inputs: The arguments by name.
            word_embeddings: The module that embeds tokens, or None in a scope.
            config: The model's config, or None in a scope.
        """
        ...

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the new value of what the module returned."""
        ...


@dataclass(frozen=True)
class PromptRule(BoundaryRule):
    """The rule of all prompt methods: something computes virtual tokens, and they go somewhere.

    Attributes:
        encoder: What computes them.
        placement: Where they go.
    """

    encoder: Encoder
    placement: Placement

    @property
    def more_inputs(self) -> tuple[str, ...]:
        """What both ask for."""
        return (*self.encoder.asks, *self.placement.asks)

    def check(self, site: CallSite, config: Any) -> str | None:
        """Returns why the module can't take the virtual tokens, or None."""
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
        """Returns what the placement makes of the output."""
        return self.placement.leave(output, inputs, entered)


@dataclass(frozen=True)
class InFront:
    """In front of the tokens that a Transformers model reads.

    Attributes:
        tokens: How many there are.
        follows: The names of arguments that say something of tokens behind the prompt, and are moved there: labels
            by token, and positions.
        positions: How many positions the model has a table for; None without a table.
        asks: The other name of its cache, if its forward takes one.
    """

    tokens: int
    follows: tuple[str, ...]
    positions: int | None
    asks: tuple[str, ...] = ()

    def check(self, site: CallSite) -> str | None:
        """Returns why the module can't take a prompt, or None."""
        if "inputs_embeds" not in site.arguments:
            return "its forward has no argument inputs_embeds"
        return no_room(self.tokens, self.positions)

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the virtual tokens in front, and lengthens what goes along."""
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

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the output as it is."""
        return output


@dataclass(frozen=True)
class InEncoding:
    """In what a decoder reads from its encoder, which has the virtual tokens: the mask for it gets longer.

    Attributes:
        tokens: By how many tokens.
    """

    tokens: int

    @property
    def asks(self) -> tuple[str, ...]:
        """None."""
        return ()

    def check(self, site: CallSite) -> str | None:
        """Returns why the decoder can't read a longer encoding, or None."""
        has_mask = "encoder_attention_mask" in site.arguments
        return None if has_mask else "its forward has no argument encoder_attention_mask"

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Lengthens the mask for the encoder's tokens."""
        return {"encoder_attention_mask": lengthened(inputs["encoder_attention_mask"], self.tokens, 1)}

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Returns the output as it is."""
        return output


@dataclass(frozen=True)
class Nothing:
    """No virtual tokens: those of another module reach this one."""

    asks: ClassVar[tuple[str, ...]] = ()

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns none."""
        return {}

    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Has nothing to fill."""

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns None."""
        return None


def no_room(tokens: int, positions: int | None) -> str | None:
    """Returns why a prompt doesn't fit into a table of positions, or None; without a table (None) it does."""
    if positions is None or tokens < positions:
        return None
    return f"a prompt of {tokens} tokens leaves no room in its table of {positions} positions"


# caches


def other_cache_names(arguments: Collection[str]) -> tuple[str, ...]:
    """Returns the names under which a forward gets its cache by keyword, beside that in its signature."""
    return CACHES[1:] if CACHES[0] in arguments and set(CACHES[1:]).isdisjoint(arguments) else ()


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """Returns the cache, under whichever name it is given; None if the forward takes none."""
    given = [inputs[name] for name in CACHES if name in inputs]
    return the_given(*given) if len(given) > 1 else next(iter(given), None)


def under_one_name(cache: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the arguments for a cache: the first of them gets it."""
    first, *others = (name for name in CACHES if name in inputs)
    return {first: cache} | {name: absent(inputs[name]) for name in others}


# where prompts go in

ENCODER, DECODER, GENERATOR = "encoder", "decoder", "generator"
LABELS_TOKENS, LABELS_SEQUENCES = "labels tokens", "labels sequences"
"""The roles of modules that get a prompt."""


def transformers_sites(finder: SiteFinder, report: Report, task: TaskType | None) -> list[CallSite]:
    """Returns the boundaries at which a Transformers model takes a prompt.

    Args:
        finder: Finds sites in the model.
        report: Gets what can't take one.
        task: What the model is for.
    """
    model: Any = finder.modules[""]
    if _is_pair(model):
        roles = {ENCODER: model.get_encoder(), DECODER: model.get_decoder()}
    else:
        roles = {LABELS_TOKENS if _labels_tokens(task, model) else LABELS_SEQUENCES: model}
    sites = [_site(finder, report, role, module) for role, module in roles.items()]
    return [site for site in sites if site is not None]


def cache_sites(finder: SiteFinder, report: Report) -> list[CallSite]:
    """Returns the boundary of the module of a Transformers model that takes a cache.

    Args:
        finder: Finds sites in the model.
        report: Gets the reason why there is none.
    """
    model: Any = finder.modules[""]
    if not hasattr(model, "get_input_embeddings"):
        reason = f"a {type(model).__name__} has no get_input_embeddings, by which the embedding of tokens is found"
        report.refused.append(Refusal("the model", reason, "adapt the Transformers model itself"))
        return []
    candidates = [model.get_decoder()] if _is_pair(model) else [model, *model.children()]
    role = GENERATOR if generates_by_mask(model) else DECODER
    for module in candidates:
        if not set(CACHES).isdisjoint(inspect.signature(module.forward).parameters):
            site = _site(finder, report, role, module)
            return [site] if site is not None else []
    report.refused.append(Refusal("the model", "its forward takes no cache, where a prefix goes", "use prompt tuning"))
    return []


def generates_by_mask(model: Any) -> bool:
    """Tells whether `generate` counts the positions of a model's tokens by their mask, and hands them in."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not _is_pair(model)


def _is_pair(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _site(finder: SiteFinder, report: Report, role: str, module: Any) -> CallSite | None:
    owner = _path_of(module, finder.modules)
    try:
        region, nodes, arguments = boundary(finder.regions, owner)[:3]
    except TraceError as error:
        way_out = "give its forward arguments with names and plain defaults"
        report.refused.append(Refusal(owner or "the model", str(error), way_out))
        return None
    model: Any = finder.modules[""]
    beside = _path_of(model.get_input_embeddings(), finder.modules), "weight"
    reads = (("word_embeddings", _path_within(module, module.get_input_embeddings())),)
    reads += (("config", "config"),) if hasattr(module, "config") else ()
    return CallSite(
        region, nodes, owner, role, beside, torch.get_default_dtype(), arguments, reads, positions=_positions(module)
    )


def _positions(module: Any) -> int | None:
    """Returns how many positions a module has a table for; None if it computes them."""
    tables = [
        inner
        for path, inner in module.named_modules()
        if isinstance(inner, nn.Embedding) and any(word in path for word in ("position", "wpe"))
    ]
    most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if not tables or most is None:
        return None
    # the first positions of such a table are for padding
    reserved = max(0 if table.padding_idx is None else table.padding_idx + 1 for table in tables)
    return min(most, *(table.num_embeddings for table in tables)) - reserved


def _path_of(module: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    return next(path for path, other in modules.items() if other is module)


def _path_within(outer: nn.Module, module: nn.Module) -> str:
    """Returns a path from `outer` to a module inside, which may have another one from the model."""
    return next(path for path, other in outer.named_modules(remove_duplicate=False) if other is module)


def _labels_tokens(task: TaskType | None, model: nn.Module) -> bool:
    """Tells whether a model's labels are one for each token of its input; without a task its class's name tells."""
    if task is None:
        return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForTokenClassification", "ForMaskedLM"))
    return task in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS)


# nodes


@recorded
def absent(value: object) -> None:
    """Returns None, in the place of an input that another one replaces."""


@recorded
def the_given(*values: Any) -> Any:
    """Returns the first of `values` that isn't None."""
    return next((value for value in values if value is not None), None)


@recorded
def embeddings_of(input_ids: Tensor | None, inputs_embeds: Tensor | None, word_embeddings: nn.Module) -> Tensor:
    """Returns the embeddings of the tokens, (batch, tokens, dim), whichever way they were given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds to a model with a prompt, and not both")
    return word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds


@recorded
def prepended(prompt: Tensor, tokens: int, embeddings: Tensor, cache: Any, positions: int | None) -> Tensor:
    """Puts the first virtual tokens in front of each sequence, unless the cache has them already.

    Args:
        prompt: The virtual tokens, (tokens, dim) or (batch, tokens, dim).
        tokens: How many of them.
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
            f"{tokens} virtual tokens and {embeddings.shape[1]} of the input are more than the {positions} positions "
            "that the model has a table for; shorten the input"
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
    """Does as `lengthened`, for a mask of what the cache has, and of the sequences, (batch, length, …).

    Raises:
        ValueError: If it is of more or fewer tokens.
    """
    longer = lengthened(mask, tokens, 1)
    if longer is not None and longer.shape[1] != _length(embeddings, cache, longer.shape[1]):
        raise ValueError(_cut(longer.shape[1], _length(embeddings, cache, 0), "the attention mask"))
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
    if most > _length(embeddings, cache, most):
        raise ValueError(_cut(most, _length(embeddings, cache, most), "position_ids"))
    return position_ids


def _length(embeddings: Tensor, cache: Any, unknown: int) -> int:
    """Returns how many tokens there are, with those of a cache; `unknown` if that doesn't tell."""
    if not has_tokens(cache) or not hasattr(cache, "get_seq_length"):
        return unknown
    return cache.get_seq_length() + embeddings.shape[1]


def _cut(told: int, there: int, by: str) -> str:
    return (
        f"there are {told} tokens by {by}, and {there} in the cache and the input, with those of the prompt: generate "
        "cuts off as many tokens as a cache has, of which some are virtual; call generate without a cache"
    )


@recorded
def lengthened_at_first(values: Tensor | None, tokens: int, value: int, cache: Any) -> Tensor | None:
    """Does as `lengthened`, where the prompt goes in now."""
    return values if values is None or has_tokens(cache) else F.pad(values, (tokens, 0), value=value)


@recorded
def shifted(positions: Tensor | None, tokens: int) -> Tensor | None:
    """Moves positions behind the virtual tokens."""
    return None if positions is None else positions + tokens


def has_tokens(cache: Any) -> bool:
    """Tells whether a cache holds tokens, the prompt's first of all."""
    if cache is None:
        return False
    return len(cache) > 0 if isinstance(cache, tuple | list) else cache.get_seq_length() > 0
