"""The base class of the configs of prompt methods: the sizes of the model, and the modules that get a prompt."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from graphpeft.graph.paths import join
from graphpeft.graph.traced_model import module_told
from graphpeft.methods.prompts import transformers_sites
from graphpeft.methods.prompts.caches import other_cache_names
from graphpeft.methods.prompts.encoders import EMBEDDINGS_KEY, ENCODER_PREFIX, Encoder, NoPrompt, Table
from graphpeft.methods.prompts.in_front import LABELS, POSITIONS, InEncoding, Prepended
from graphpeft.methods.prompts.in_scope import InScope
from graphpeft.methods.prompts.model_sizes import SIZES, sizes_in, text_config_of
from graphpeft.methods.prompts.prompt_rule import PromptRule
from graphpeft.methods.prompts.scope_sites import SCOPE, scope_sites
from graphpeft.peft_errors import PeftWarning
from graphpeft.rules.config import OWN, PeftConfig
from graphpeft.rules.options import Layers, Size, Within
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import Rule
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.targeting import targets


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """The options of all prompt methods; the names and meanings are PEFT's. A size of None is read from the model.

    Attributes:
        num_virtual_tokens: The number of virtual tokens.
        token_dim: The number of values of an embedding.
        num_transformer_submodules: The number of the model's parts with tokens of their own, 1 or 2, as PEFT counts.
        num_attention_heads: The number of attention heads.
        num_layers: The number of layers, which have keys and values of their own.
        prompt_scope: The modules, in any model, whose token sequence gets the virtual tokens: names that match as
            `target_modules` do. None for a Transformers model, which gets them where PEFT puts them. It isn't an option
            of PEFT's.
        prompt_position: Whether they stand ``"before"`` or ``"after"`` the tokens of a scope. It isn't an option of
            PEFT's.
        labels_include_prompt: Whether labels of tokens, and positions of answers, count the virtual tokens already, as
            in PEFT's TOKEN_CLS and QUESTION_ANS. By default they are for the input alone, and are moved. It isn't
            an option of PEFT's.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> isinstance(PromptTuningConfig(num_virtual_tokens=2), PromptLearningConfig)
        True
    """

    file_prefix: ClassVar[str] = "base_model."
    adds_tokens: ClassVar[bool] = True

    num_virtual_tokens: Size | None = None
    token_dim: Size | None = None
    num_transformer_submodules: Annotated[int, Within("1 or 2", 1, 2)] | None = None
    num_attention_heads: Size | None = None
    num_layers: Layers | None = None
    prompt_scope: str | list[str] | None = field(default=None, metadata=OWN)
    prompt_position: Literal["before", "after"] = field(default="before", metadata=OWN)
    labels_include_prompt: bool = field(default=False, metadata=OWN)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._encoder_is_lost = False

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method gives the model a prompt, which is so."""
        return True

    def check(self) -> None:
        """Raises ValueError for options that this library doesn't support."""
        super().check()
        if self.num_virtual_tokens is None:
            raise ValueError("num_virtual_tokens is None; say how many virtual tokens there are to be")

    def encoder(self) -> Encoder:
        """Returns the encoder of the virtual tokens in training."""
        raise NotImplementedError

    def find_sites(self, finder: SiteFinder, report: Report) -> list[CallSite]:
        """Returns the boundaries at which the model takes the prompt."""
        if self.prompt_scope is not None:
            return self._find_scopes(self.prompt_scope, finder, report)
        model = finder.modules[""]
        embedding = module_told(model, "get_input_embeddings")
        if embedding is None:
            reason = f"a {type(model).__name__} has no get_input_embeddings, by which the embedding of tokens is found"
            report.refused.append(Refusal("the model", reason, "name the module to prompt in prompt_scope"))
            return []
        if not self._fits_embedding(embedding, report):
            return []
        return transformers_sites.transformers_sites(finder, report, self.task_type)

    def _fits_embedding(self, embedding: nn.Module, report: Report) -> bool:
        """Returns whether virtual tokens are as long as embeddings of tokens, and reports if they aren't."""
        size = getattr(getattr(embedding, "weight", None), "shape", (self.token_dim,))[-1]
        if self.token_dim is not None and size != self.token_dim:
            reason = f"token_dim is {self.token_dim}, and the embedding of a token has {size} values"
            report.refused.append(Refusal("the model", reason, f"set token_dim={size}"))
        return size == self.token_dim

    def _find_scopes(self, scope: str | list[str], finder: SiteFinder, report: Report) -> list[CallSite]:
        sites, sizes = scope_sites(scope, self.prompt_position, finder, report, torch.get_default_dtype())
        if self.token_dim is None and sites:
            if len(set(sizes)) != 1:
                told = (
                    f"tokens have several sizes: {sorted(set(sizes))}" if sizes else "the size of a token isn't known"
                )
                report.refused.append(Refusal("prompt_scope", told, "pass example_inputs, or set token_dim"))
                return []
            self.token_dim = sizes[0]
        elif set(sizes) - {self.token_dim}:
            reason = f"token_dim is {self.token_dim}, and tokens have {sorted(set(sizes))} values"
            report.refused.append(Refusal("prompt_scope", reason, "leave token_dim out"))
            return []
        return sites

    def naming(self, sites: Sequence[Any], names: Collection[str]) -> PeftConfig:
        """Returns the config with a scope that names these modules alone."""
        if self.prompt_scope is None:
            return super().naming(sites, names)
        config = copy.copy(self)
        scope = targets.exactly([site.name for site in sites], names)
        config.prompt_scope = scope if isinstance(scope, str) else sorted(scope)
        return config

    def rule_for(self, site: CallSite, dtype: torch.dtype) -> Rule:
        """Returns the rule for a boundary."""
        assert self.num_virtual_tokens is not None
        if site.role == SCOPE:
            encoder = self.encoder_in_use()
            scope = InScope(self.num_virtual_tokens, self.prompt_position, site.arguments[0])
            return PromptRule(encoder, scope)
        if site.role == transformers_sites.DECODER:
            return PromptRule(NoPrompt(), InEncoding(self.num_virtual_tokens))
        return PromptRule(self.encoder_in_use(), self.prepended(site))

    def prepended(self, site: CallSite) -> Prepended:
        """Returns where the virtual tokens go in a Transformers model.

        Args:
            site: The boundary of a forward that gets the virtual tokens.
        """
        assert self.num_virtual_tokens is not None
        labels = (LABELS,) if site.role == transformers_sites.LABELS_TOKENS else ()
        follows = () if self.labels_include_prompt else (*labels, *POSITIONS)
        return Prepended(self.num_virtual_tokens, follows, site.positions, other_cache_names(site.arguments))

    @property
    def holds_table(self) -> bool:
        """Whether the adapter has the virtual tokens themselves, as PEFT's files do, and not their encoder."""
        return self.inference_mode or self._encoder_is_lost

    def encoder_in_use(self) -> Encoder:
        """Returns the encoder in use: that of training, or the table that it has computed."""
        return Table() if self.holds_table else self.encoder()

    def resolved(self, model: nn.Module) -> PromptLearningConfig:
        """Returns the config with the sizes of the model filled in as PEFT fills them in."""
        config = super().resolved(model)
        assert isinstance(config, PromptLearningConfig)
        for name, sizes in sizes_in(text_config_of(model), SIZES).items():
            if getattr(config, name) is None:
                setattr(config, name, next(iter(sizes), None))
        if config.prompt_scope is not None:
            config.num_transformer_submodules = 1
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 2 if config.task_type is TaskType.SEQ_2_SEQ_LM else 1
        return config

    @property
    def total_tokens(self) -> int:
        """The number of rows of the table of virtual tokens."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    # files

    def fitted_to(self, keys: Collection[str]) -> PromptLearningConfig:
        """Returns the config for a file that may have lost the prompt encoder, as PEFT's do."""
        config = copy.copy(self)
        config._encoder_is_lost = not any(_is_of_encoder(key) for key in keys)
        if config.holds_table and not config.inference_mode and self.has_encoder:
            warnings.warn(
                "the file holds the virtual tokens alone, and not the encoder that computed them, which PEFT doesn't "
                "save: the tokens themselves are trained",
                PeftWarning,
                stacklevel=4,
            )
        return config

    @property
    def has_encoder(self) -> bool:
        """Whether something computes the virtual tokens in training."""
        return False

    def derived_tensors(self, site: CallSite, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the virtual tokens, computed without dropout."""
        if not parameters or "prompt_embeddings" in parameters:
            return {}
        device = next(iter(parameters.values())).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return {join(site.file_path, EMBEDDINGS_KEY): self.encoder().encode(parameters, False).detach()}

    def ignores(self, key: str) -> bool:
        """Returns whether a key of a file belongs to the form of the prompt, table or encoder, that isn't in use."""
        return _is_of_encoder(key) if self.holds_table else key.split(".")[-1] == EMBEDDINGS_KEY


def _is_of_encoder(key: str) -> bool:
    return key.startswith(ENCODER_PREFIX) or f".{ENCODER_PREFIX}" in key
