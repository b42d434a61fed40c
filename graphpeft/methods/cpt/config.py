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
from torch import Tensor, nn

from graphpeft.graph.hosts import sharding
from graphpeft.graph.recorded import recorded
from graphpeft.graph.traced_model import module_told
from graphpeft.methods.cpt.prepended import PrependedContext
from graphpeft.methods.prompts.encoders import EMBEDDINGS_KEY, ENCODER_PREFIX, Encoder, Table
from graphpeft.methods.prompts.prompt_config import PromptLearningConfig
from graphpeft.methods.prompts.prompt_rule import PromptRule
from graphpeft.rules.options import Editable, Index, Kind, NotNegative, Number
from graphpeft.rules.parameter_spec import ParameterSpec
from graphpeft.rules.peft_names import PeftType, TaskType
from graphpeft.rules.registry import register
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Rule
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.wording import number_of


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
    tokenizer_name_or_path: Editable[str | None] = None

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
        if tokens is None or not {EMBEDDING, DELTA}.isdisjoint(tensors):
            return tensors
        return {**tensors, EMBEDDING: tokens, DELTA: torch.zeros_like(tokens)}

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


EMBEDDING, DELTA = f"{ENCODER_PREFIX}embedding.weight", f"{ENCODER_PREFIX}delta_embedding.weight"
"""The names in files of the embeddings of the tokens, and of their change."""

_SMALLEST = 1e-10
"""The bound of tokens that aren't moved."""


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

    def parameters(self, config: Any) -> Mapping[str, ParameterSpec]:
        """Returns the embeddings, which aren't trained, and their change, which is."""
        table = Table().parameters(config)["prompt_embeddings"]
        return {
            "prompt_embedding": table._replace(key=EMBEDDING, is_trained=False, is_counted=True),
            "prompt_delta": table._replace(key=DELTA, path="delta_embedding.weight"),
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
        factors = torch.where(lengths > 0, bounds / torch.maximum(lengths, bounds), 1.0)[:, None]
        shortened = factors * delta
        if training:
            sharding.scale(delta, factors.expand_as(delta))
    moves = delta.new_tensor([kind % 4 != 0 for kind in types])[:, None]
    # the values are shortened, and only the rows that move get gradients
    return shortened + moves * (delta - delta.detach())
