"""Context-aware prompt tuning: the embeddings of given tokens, moved by a learned change of bounded length.

    tokens = E[ids] + δ,        ‖δᵢ‖ ≤ ε(type of token i) · √(dim / 2048)

Types are by token, for groups of four numbers: 1 and 3 modulo 4 are templates, 2 an input, 0 (of 4, 8, …) a label. The
loss is taken over labels, of the context and of the input, earlier ones weighing less by a factor for each step. The
model gets one more argument, `input_type_mask`, (batch, tokens). Source: Blau et al., "Context-aware Prompt Tuning",
arXiv 2410.17222; the same numbers as PEFT's ``tuners/cpt/model.py`` and ``peft_model.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.graph.recorded import recorded
from graphpeft.graph.traced_model import module_told
from graphpeft.methods.prompts.encoders import EMBEDDINGS_KEY, ENCODER_PREFIX, Encoder, Table
from graphpeft.methods.prompts.placements import Placement, Prepended, PromptRule
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.rules.options import Index, Kind, NotNegative, Number
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType, TaskType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Rule
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.wording import number_of

_EMBEDDING, _DELTA = f"{ENCODER_PREFIX}embedding.weight", f"{ENCODER_PREFIX}delta_embedding.weight"

_SMALLEST = 1e-10
"""The bound of tokens that aren't moved."""


@register
@dataclass(kw_only=True)
class CPTConfig(PromptLearningConfig):
    """The options of context-aware prompt tuning; the names, defaults and meanings are PEFT's.

    Source: Blau et al., "Context-aware Prompt Tuning", arXiv 2410.17222.

    Attributes:
        cpt_token_ids: The tokens of the context.
        cpt_mask: Read and written as PEFT does, which doesn't use it.
        cpt_tokens_type_mask: The types of these tokens: 1 and 3 modulo 4 are templates, 2 is an input, 0 a label.
        opt_weighted_loss_type: ``"decay"`` weighs earlier labels less, ``"none"`` doesn't.
        opt_loss_decay_factor: The factor for each step.
        opt_projection_epsilon: ε for inputs.
        opt_projection_format_epsilon: ε for templates.
        tokenizer_name_or_path: Read and written as PEFT does, which doesn't use it.

    Raises:
        ValueError: For a value that an option can't have, and for options of different lengths.

    Examples:
        >>> config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 2])
        >>> config.num_virtual_tokens
        2
    """

    peft_type: ClassVar[PeftType] = PeftType.CPT

    cpt_token_ids: list[Index] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[Kind] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: Number | None = 1.0
    opt_projection_epsilon: NotNegative | None = 0.1
    opt_projection_format_epsilon: NotNegative | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"a CPTConfig is for task_type='CAUSAL_LM', not {self.task_type!r}")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        if not self.cpt_token_ids:
            raise ValueError("cpt_token_ids is empty; give the tokens of a context")
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            elif len(getattr(self, name)) != self.num_virtual_tokens:
                raise ValueError(
                    f"{name} has {number_of(len(getattr(self, name)), 'value')} for "
                    f"{number_of(self.num_virtual_tokens, 'token')}"
                )

    @property
    def has_encoder(self) -> bool:
        """Whether something computes the virtual tokens in training."""
        return True

    @property
    def holds_table(self) -> bool:
        """Never: the change of the context's embeddings is beside them, so that it can be trained further."""
        return False

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the adapter's tensors; where a file has the moved embeddings alone, as PEFT's do, without a change.

        Args:
            tensors: The tensors of a file, by their names.
        """
        tokens = tensors.get(EMBEDDINGS_KEY)
        if tokens is None or not {_EMBEDDING, _DELTA}.isdisjoint(tensors):
            return tensors
        return {**tensors, _EMBEDDING: tokens, _DELTA: torch.zeros_like(tokens)}

    def check(self) -> None:
        """Raises ValueError for options that can't be."""
        super().check()
        if self.prompt_scope is not None:
            raise ValueError("prompt_scope has no place for a context, which is text; use prompt tuning")

    def find_sites(self, finder: SiteFinder, report: Report) -> list[CallSite]:
        """Returns the model's boundary, if the model knows the tokens of the context."""
        embedding: Any = module_told(finder.modules[""], "get_input_embeddings")
        known = getattr(embedding, "num_embeddings", None)
        outside = [token for token in self.cpt_token_ids or () if known is not None and token >= known]
        if outside:
            reason = f"cpt_token_ids has tokens outside of the vocabulary, such as {outside[0]}, which has {known}"
            report.refused.append(Refusal("the model", reason, "give tokens of the model's own tokenizer"))
            return []
        return super().find_sites(finder, report)

    def encoder(self) -> Encoder:
        """Returns the encoder that moves the tokens of the context."""
        return Context(
            tuple(self.cpt_tokens_type_mask or ()),
            self.opt_projection_epsilon or 0.0,
            self.opt_projection_format_epsilon or 0.0,
        )

    def rule_for(self, site: CallSite, dtype: torch.dtype) -> Rule:
        """Returns the rule for the model's boundary."""
        decay = self.opt_loss_decay_factor if self.opt_weighted_loss_type == "decay" else 1.0
        ids, types = tuple(self.cpt_token_ids or ()), tuple(self.cpt_tokens_type_mask or ())
        # the context has labels of its own
        prepended = dataclasses.replace(self.prepended(site), follows=())
        return PromptRule(self.encoder_in_use(), PrependedContext(prepended, ids, types, decay or 0.0))


@dataclass(frozen=True)
class PrependedContext(Placement):
    """In front of the input, with labels of their own, and with a loss over the labels of both.

    Attributes:
        prepended: Where the tokens go.
        ids: The tokens of the context.
        types: Their types.
        decay: By which factor each step back weighs less.
    """

    prepended: Prepended
    ids: tuple[int, ...]
    types: tuple[int, ...]
    decay: float

    @property
    def asks(self) -> tuple[str, ...]:
        """The types of the input's tokens, and the arguments for the place in front."""
        return ("input_type_mask", *self.prepended.asks)

    def check(self, site: CallSite) -> str | None:
        """Returns the reason why the module can't take a prompt, or None."""
        if "labels" not in site.arguments:
            return "its forward takes no labels, over which a context is trained"
        return self.prepended.check(site)

    def enter(self, prompt: Any, inputs: Mapping[str, Any], word_embeddings: Any, config: Any) -> dict[str, Any]:
        """Puts the context in front, with its labels."""
        changed = self.prepended.enter(prompt, inputs, word_embeddings, config)
        changed["labels"] = labels_with_context(inputs["labels"], inputs["input_type_mask"], self.ids, self.types)
        return changed

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        """Takes the loss over labels, weighed by their distance from the end."""
        return with_loss(output, entered["labels"], inputs["input_type_mask"], self.types, self.decay)


@dataclass(frozen=True)
class Context(Encoder):
    """The tokens of a context with their change.

    Attributes:
        types: The types of the tokens.
        epsilon: ε for inputs.
        format_epsilon: ε for templates.
    """

    types: tuple[int, ...]
    epsilon: float
    format_epsilon: float

    def parameters(self, config: CPTConfig) -> Mapping[str, ParameterSpec]:
        """Returns the embeddings, which aren't trained, and their change, which is."""
        table = Table().parameters(config)["prompt_embeddings"]
        return {
            "prompt_embedding": table._replace(key=_EMBEDDING, is_trained=False, is_counted=True),
            "prompt_delta": table._replace(key=_DELTA, path="delta_embedding.weight"),
        }

    @torch.no_grad()
    def initialise(self, parameters: Mapping[str, Tensor], config: Any, embedding: nn.Module) -> None:
        """Takes the embeddings of the context's tokens, and no change."""
        weight: Any = embedding.weight
        parameters["prompt_embedding"].copy_(embedding(torch.tensor(config.cpt_token_ids, device=weight.device)))
        parameters["prompt_delta"].zero_()

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the moved tokens."""
        epsilons = (self.epsilon, self.format_epsilon)
        return parameters["prompt_embedding"] + bounded(parameters["prompt_delta"], self.types, epsilons, training)


@recorded
def bounded(delta: Tensor, types: tuple[int, ...], epsilons: tuple[float, float], training: bool) -> Tensor:
    """Returns a change whose rows are no longer than the bounds of their types; only those with a bound are trained.

    In training the parameter itself is shortened, as in PEFT, so that the optimizer goes on from there.
    """
    scale = math.sqrt(delta.shape[1] / 2048)
    by_type = (_SMALLEST, epsilons[1] * scale, epsilons[0] * scale, epsilons[1] * scale)
    bounds = delta.new_tensor([by_type[kind % 4] if kind > 0 else _SMALLEST for kind in types])
    with torch.no_grad():
        lengths = delta.norm(dim=1)
        shortened = torch.where(lengths > 0, bounds / torch.maximum(lengths, bounds), 1.0)[:, None] * delta
        if training:
            delta.copy_(shortened)
    moves = delta.new_tensor([kind % 4 != 0 for kind in types])[:, None]
    # the values are shortened, and only the rows that move get gradients
    return shortened + moves * (delta - delta.detach())


@recorded
def labels_with_context(
    labels: Tensor | None, input_types: Tensor | None, ids: tuple[int, ...], types: tuple[int, ...]
) -> Tensor | None:
    """Puts the context's tokens in front of the labels, (batch, tokens), and keeps those that are labels by type."""
    if labels is None:
        return None
    all_types = types_with_context(labels, input_types, types)
    context = labels.new_tensor(ids).expand(labels.shape[0], -1)
    is_label = (all_types > 0) & (all_types % 4 == 0)
    return torch.cat((context, labels), dim=1).masked_fill(~is_label, -100)


def types_with_context(labels: Tensor, input_types: Tensor | None, types: tuple[int, ...]) -> Tensor:
    """Returns the types of the context's tokens and of the input's, which are numbered on, (batch, tokens)."""
    given = torch.full_like(labels, 4) if input_types is None else input_types.to(labels.device)
    context = given.new_tensor(types).expand(labels.shape[0], -1)
    return torch.cat((context, torch.where(given > 0, given + max(types), given)), dim=1)


@recorded
def with_loss(
    output: Any, labels: Tensor | None, input_types: Tensor | None, types: tuple[int, ...], decay: float
) -> Any:
    """Returns a model's output with the mean loss of its labels, each label weighed by how far from the last it is.

    Args:
        output: The output, with `logits` of shape (batch, tokens, vocabulary).
        labels: The labels of the context and of the input, (batch, tokens), or None.
        input_types: The types of the input's tokens, or None.
        types: The types of the context's tokens.
        decay: The factor for each step back.
    """
    if labels is None:
        return output
    if isinstance(output, tuple):
        raise ValueError("a model with a context computes its own loss from the output's logits; pass return_dict=True")
    all_types = types_with_context(labels[:, len(types) :], input_types, types)[:, 1:]
    targets = labels[:, 1:]
    losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="none")
    weights = torch.ones_like(losses)
    for row, kinds in zip(weights, all_types, strict=True):
        last_first = kinds[(kinds > 0) & (kinds % 4 == 0)].unique().flip(0)
        for steps, kind in enumerate(last_first):
            row[kinds == kind] = decay**steps
    output.loss = (losses * weights)[targets != -100].mean()
    return output
