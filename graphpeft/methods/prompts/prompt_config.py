"""What the configs of all prompt methods hold: the sizes of the model that PEFT writes down, and where prompts go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from graphpeft.graph.paths import TensorPaths, join
from graphpeft.graph.traced_model import module_told
from graphpeft.methods.prompts import prompting
from graphpeft.methods.prompts.prompting import (
    EMBEDDINGS_KEY,
    Encoder,
    InEncoding,
    InFront,
    Nothing,
    PromptRule,
    other_cache_names,
)
from graphpeft.methods.prompts.scopes import SCOPE, InScope, scope_sites
from graphpeft.rules.config import OWN, PeftConfig
from graphpeft.rules.options import Layers, Size, Within
from graphpeft.rules.peft_names import TaskType
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.rule import ParameterSpec, Rule
from graphpeft.sites.finder import SiteFinder
from graphpeft.sites.site import CallSite
from graphpeft.targeting import targets

ENCODER_PREFIX = "prompt_encoder."
"""What the names of a prompt encoder's own tensors begin with in files; PEFT doesn't save them, and ignores them."""


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """The options of all prompt methods; the names and meanings are PEFT's. What is None is read from the model.

    Attributes:
        num_virtual_tokens: The number of virtual tokens.
        token_dim: The size of an embedding.
        num_transformer_submodules: How many parts of the model have tokens of their own, as PEFT counts them.
        num_attention_heads: The number of attention heads.
        num_layers: The number of layers.
        prompt_scope: The modules, in any model, whose token sequence gets the virtual tokens: names that match as
            `target_modules` do. None for a Transformers model, which gets them where PEFT puts them. It isn't an option
            of PEFT's.
        prompt_position: Whether they stand ``"before"`` or ``"after"`` the tokens of a scope.
        labels_include_prompt: Whether labels of tokens, and positions of answers, count the virtual tokens already, as
            PEFT takes those of TOKEN_CLS and QUESTION_ANS. By default they are those of the input, and are moved.
    """

    file_prefix: ClassVar[str] = "base_model."
    not_of_tensors: ClassVar[frozenset[str]] = PeftConfig.not_of_tensors | {
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }

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

    def check(self) -> None:
        """Raises ValueError for options that this library doesn't support."""
        super().check()
        if self.num_virtual_tokens is None:
            raise ValueError("num_virtual_tokens is None; say how many virtual tokens there are to be")

    def encoder(self) -> Encoder:
        """Returns what computes the virtual tokens in training."""
        raise NotImplementedError

    def find_sites(self, finder: SiteFinder, report: Report, owned: TensorPaths) -> list[CallSite]:
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
        return prompting.transformers_sites(finder, report, self.task_type)

    def _fits_embedding(self, embedding: nn.Module, report: Report) -> bool:
        """Tells whether virtual tokens are as long as embeddings of tokens, and reports if they aren't."""
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
        if site.role == prompting.DECODER:
            return PromptRule(Nothing(), InEncoding(self.num_virtual_tokens))
        return PromptRule(self.encoder_in_use(), self.in_front(site))

    def in_front(self, site: CallSite) -> InFront:
        """Returns where the virtual tokens go in a Transformers model.

        Args:
            site: The boundary of a forward that gets the virtual tokens.
        """
        assert self.num_virtual_tokens is not None
        labels = (prompting.LABELS,) if site.role == prompting.LABELS_TOKENS else ()
        follows = () if self.labels_include_prompt else (*labels, *prompting.POSITIONS)
        return InFront(self.num_virtual_tokens, follows, site.positions, other_cache_names(site.arguments))

    @property
    def holds_table(self) -> bool:
        """Whether the adapter has the virtual tokens themselves, and not what computes them, as PEFT's files do."""
        return self.inference_mode or self._encoder_is_lost

    def encoder_in_use(self) -> Encoder:
        """Returns what computes the virtual tokens now."""
        return Table() if self.holds_table else self.encoder()

    def resolved(self, model: nn.Module) -> PromptLearningConfig:
        """Returns the config with the sizes of the model filled in as PEFT fills them in."""
        config = super().resolved(model)
        assert isinstance(config, PromptLearningConfig)
        for name, sizes in _sizes(model).items():
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
        if config._encoder_is_lost and not config.inference_mode and self.has_encoder:
            warnings.warn(
                "the file holds the virtual tokens alone, and not the encoder that computed them, which PEFT doesn't "
                "save: the tokens themselves are trained",
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
        with torch.no_grad():
            return {join(site.file_path, EMBEDDINGS_KEY): self.encoder().encode(parameters, False).detach()}

    def ignores(self, key: str) -> bool:
        """Tells whether `key` belongs to the form of the prompt, computed or computing, that isn't in use."""
        return _is_of_encoder(key) if self.holds_table else key.split(".")[-1] == EMBEDDINGS_KEY


@dataclass(frozen=True)
class Table:
    """Virtual tokens that are parameters themselves."""

    asks: ClassVar[tuple[str, ...]] = ()

    def parameters(self, config: PromptLearningConfig) -> Mapping[str, ParameterSpec]:
        """Returns the table of tokens."""
        assert config.token_dim is not None
        return {"prompt_embeddings": ParameterSpec((config.total_tokens, config.token_dim), EMBEDDINGS_KEY)}

    def initialise(
        self, parameters: Mapping[str, torch.Tensor], config: PromptLearningConfig, embedding: nn.Module
    ) -> None:
        """Draws the table as ``nn.Embedding`` does."""
        nn.init.normal_(parameters["prompt_embeddings"])

    def encode(self, parameters: Mapping[str, Any], training: Any, **asked: Any) -> Any:
        """Returns the table."""
        return parameters["prompt_embeddings"]


def _is_of_encoder(key: str) -> bool:
    return key.startswith(ENCODER_PREFIX) or f".{ENCODER_PREFIX}" in key


def _sizes(model: nn.Module) -> dict[str, list[int]]:
    """Returns the candidates for the sizes in the config of a model, in the order in which PEFT asks for them."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    asked = {
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
        "token_dim": ("hidden_size", "n_embd", "d_model"),
        "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    }
    values = {name: [getattr(config, option, None) for option in options] for name, options in asked.items()}
    return {name: [value for value in of_name if value is not None] for name, of_name in values.items()}


# networks that compute virtual tokens


def network_parameters(network: nn.Module) -> dict[str, ParameterSpec]:
    """Returns the weights of a network as parameters of an adapter, which files name as PEFT's encoder does."""
    return {
        _local(name): ParameterSpec(tuple(parameter.shape), ENCODER_PREFIX + name)
        for name, parameter in network.named_parameters()
    }


@torch.no_grad()
def fill_from(parameters: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    """Gives parameters the values of a network's weights."""
    for name, value in network.named_parameters():
        parameters[_local(name)].copy_(value)


def linear_by(name: str, x: Any, parameters: Mapping[str, Any]) -> Any:
    """Returns what the network's layer `name`, its dots as underscores, makes of `x`."""
    return F.linear(x, parameters[f"prompt_{name}_weight"], parameters[f"prompt_{name}_bias"])


def _local(name: str) -> str:
    return f"prompt_{name.replace('.', '_')}"
